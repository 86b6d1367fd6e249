"""Generated documents: recall tasks with their answers, used for training and for evaluation alike."""

from .recall import TASKS, Prompt, Task, from_tokens, generator, training_row

__all__ = ["TASKS", "Prompt", "Task", "from_tokens", "generator", "training_row"]
