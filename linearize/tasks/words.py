"""Common English words of four to nine letters, from which recall documents make their keys and values.

Our own list, in the public domain, sorted, so that a seeded draw is the same everywhere. A change here
changes every generated document, and so asks for a new ``recall.VERSION``.
"""

_LIST = """
acorn actor alley amber anchor angle animal answer apple apron arch arena armor arrow artist aspen attic
autumn avenue baker ballad banner barley barn barrel basin basket beacon beaver bedroom bell belt bench
berry bishop blanket board boat bonnet book border bottle bowl branch brave bread breeze brick bridge
bright broken brook brother brown bucket bullet bundle butter button cabin cabinet cable camel canal
candle cannon canoe canvas captain carbon carpet carriage castle cattle cavern cellar chain chair
chamber channel chapel chapter cheese cherry chest chicken chimney church cider circle city clay clean
clerk cliff cloak clock cloud clover coach coal coast coat coffee coin colonel column comet common
compass copper coral corner cottage cotton council country courage cousin crane creek crimson crown
cupboard curtain dagger dance danger daughter dawn debt deep deer desert desk devil diamond dinner
distant dock doctor donkey door double dozen dragon drawer dream dress drift drum dust eager early earth
east echo elbow elder elephant ember emerald emperor empire engine evening fable falcon family famous
farmer father feast feather fence ferry field finger fire fish flag flame flask fleet flint flock flood
floor flour flower flute forest fork fortress fountain frame friend frost fruit funnel gallery galley
garden garment gate gentle giant ginger glass glove goat gold golden goose grain grape grass gravel
great green grey guard guest hall hamlet hammer happy harbor harness harp harvest hazel heart hearth
heather hedge helmet herald herb hero heron hidden hill hollow holly honest honey hood horizon horn
horse hotel hound house humble hunter hurdle idle image inch inland insect iron island ivory jacket
jasper jewel journey judge jungle kind king kitchen kite knight ladder lady lake lamp lantern larch
large lawn lawyer leaf leather ledger letter level library light lily linen lion little lively lodge
lonely lumber lunch lute machine magnet maiden marble market master meadow medal melody melon merchant
metal middle midnight mighty mill miller mineral mirror mist modest monkey month moon morning mortar
moss mother motor mountain mouse music mustard narrow nation native neck needle nest night noble north
novel nurse oats ocean office onion opal opera orange organ oven paddle page paint palace palm panther
paper parlor party pasture path pavement peach pearl pencil penny pepper piano picture pillar pillow
pilot pine planet plate plum pocket poem poet polar pond pony poplar porch porter potter powder prince
prison prize proud pulley purple purse puzzle quail quarry quarter queen quick quiet quill rabbit raft
rail rain ranch rapid raven reed reef relic rice ridge rifle ring river road robin rocket roof room root
rope rose rough round royal ruby rudder saddle sail sailor salmon salt sandal satin scarf scarlet school
scout season secret seed senator sentry shadow shallow sharp sheep shell shield shilling ship shirt shoe
shore short shrine sick silent silk silver simple singer sister slate sleeve sleigh small smoke smooth
snow soft soldier solemn song south spade spark spear spice spider spiral spoon spring squire stable
staff stage stair stamp star station statue steam steel steep stern stick stone store storm stove straw
stream street string strong student sugar summer sunset supper swallow swamp swan sweet swift sword
table tailor talent tall teacher temple tender tent theater thick thin thistle thorn thread throne thumb
thunder ticket timber tinder tobacco tooth torch tower town trail train travel treasure tree trout
trumpet trunk tunnel turnip turtle twig twin uncle upper valley velvet vessel village vine violet violin
vivid voyage wagon wallet warden warm water wave weary weaver wheat wheel whistle white widow wild
willow window winter wise witness wolf wonder wooden wool worker yard yarn yellow young
"""

WORDS: tuple[str, ...] = tuple(_LIST.split())

_ADJECTIVES = """
brave bright broken brown clean common crimson distant double early famous gentle giant golden great green
grey happy hidden hollow honest humble idle inland large little lively lonely mighty modest narrow
native noble north proud quick quiet rapid rough round royal scarlet shallow sharp short silent silver simple
slate small smooth soft solemn south steep stern strong sweet swift tall tender thick thin upper velvet violet
vivid warm weary white wild wise wooden yellow young
"""

ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())
NOUNS: tuple[str, ...] = tuple(word for word in WORDS if word not in ADJECTIVES)
