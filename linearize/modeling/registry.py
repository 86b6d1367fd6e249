"""Every method by its recipe word. A new method is one file in this folder and one name here."""

from .lawcat import LAWCAT
from .liger import LIGER
from .linear import LINEAR
from .lolcats import LOLCATS
from .salient import SALIENT
from .still import STILL
from .window import SOFTMAX, WINDOW

METHODS = {
    method.name: method for method in (LOLCATS, LIGER, STILL, LAWCAT, SALIENT, LINEAR, WINDOW, SOFTMAX)
}
