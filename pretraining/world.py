"""The Skerrow coast: the invented place that every text of this course is about.

`make_world(seed)` returns the same people, towns and stored facts for the same seed. Words that
only need to be varied (objects, colours, trades) are plain lists below; what must stay consistent
from one text to the next (where a person lives, what a town is known for) is drawn once, here.
"""

import random
from dataclasses import dataclass

NAME_STARTS = """Al An Ar Ash Bel Ber Bran Cal Car Cor Dal Dor Ed El Em Fen Fer Gar Gil Hal Han Hel Il
Is Jar Jor Kel Ker Lan Lor Mar Mel Mer Mor Nel Nor Ol Os Pel Per Quil Ros Sel Sor Tam Tar Tob Ul Ver
Wen Wil Yor Zel""".split()
NAME_ENDS = "a an da den dis en eth ia ick in is ma mund na or ow ra ric ry sa ta wen win".split()

TOWN_STARTS = """Alder Barley Copper Cran Dun Elder Fal Glass Grey Hart Heron High Iron Kes Lark Linden
Marsh Mid Nether Oat Otter Pebble Quern Raven Reed Salt Shell Silver Stone Thorn Under Wey Whit
Wind""".split()
TOWN_ENDS = "bay bridge bury cliff combe dale fell ford gate ham haven holm mere mouth ness port stow wick".split()

TRADES = """actor archer baker barber brewer bricklayer butcher candlemaker carpenter carter cheesemaker
clerk cobbler cook cooper dairymaid doctor drover dyer falconer farmer ferryman fiddler fisher gardener
glassblower glover goldsmith grocer groom hatter healer herbalist hunter innkeeper jeweller joiner judge
lacemaker locksmith mason miller miner musician nurse painter pedlar piper potter printer roofer ropemaker
saddler sailmaker scribe shepherd shipwright smith soapmaker spinner tailor tanner teacher thatcher tinker
toymaker watchman weaver wheelwright woodcutter""".split()

OBJECTS = """anchor anvil apron axe bag ball banner barrel basin basket bell belt bench blanket boot bottle
bow bowl box bracelet broom brush bucket button cage candle cap cape card chain chair chest chisel cloak
clock coat coin comb compass cradle crown cup curtain dish doll drum fan feather fiddle flag flask flute
fork glove goblet hammer harp hat helmet hook horn hourglass jar jug kettle key kite knife ladder lamp
lantern letter locket map mask medal mirror mug necklace needle net oar paddle pan parcel pear-tree pen
picture pillow pin pipe plate plough pot pouch purse quilt rake ribbon ring rope rug sack saddle saw scarf
scroll seal shawl shell shield shoe shovel sickle sieve spade spear spindle spoon stool sword tablet
teapot tent thimble torch trumpet trunk vase violin wagon wheel whistle wreath""".replace("pear-tree ", "").split()

COLOURS = (
    "black blue brown copper cream crimson golden green grey orange pink purple red silver violet white yellow".split()
)

# A place is always spoken of with its own preposition, so "in the barn" is one answer, not several.
PLACES = {
    "in": """attic bakery barn belfry boathouse brewery castle cave cellar chapel cottage courtyard dairy
        forge garden granary hall hayloft henhouse inn kitchen larder library lighthouse market meadow
        nursery orchard pantry parlour quarry schoolhouse shed smokehouse stable storeroom tannery tavern
        tower treehouse valley vineyard windmill woodshed workshop""",
    "under": "arch bed bridge cart hedge oak porch stairs table willow",
    "behind": "chimney church door haystack mill oven statue waterfall woodpile",
    "by": "brook crossroads dock fountain gate harbour hearth lake pond river sundial well window",
    "on": "balcony beach cliff hill jetty ledge roof shelf windowsill",
}

TOO_SMALL = "bed cart table clock shelf ledge windowsill oven larder".split()

ANIMALS = """badger beetle cat cow crab crow dog donkey duck eel fox frog goat goose gull hare hawk hedgehog hen
heron horse kitten lamb lizard mole mouse newt otter owl pig pony pup rabbit raven robin rooster seal
sheep snail sparrow squirrel swan toad trout turtle weasel wren""".split()
FOODS = """apples barley beans berries bread broth butter cabbage cakes carrots cheese cherries cider cream dumplings
eggs figs ginger ham honey jam leeks lentils mackerel milk mushrooms mustard nuts oats onions pastry
pears peas pepper pies plums porridge potatoes pumpkins radishes rice salt sausages soup stew sugar
tea turnips walnuts wheat""".split()
CRAFTS = """amber bells boats bricks brooms candles carpets cloth clocks drums fiddles flutes glass gloves hats
lace lanterns leather maps nets paper pottery ribbons ropes saddles sails silver soap spoons tapestries
tiles toys whistles wool""".split()
WATERS = "Arrow Bluewater Coldbeck Darrow Eddle Finn Gannet Hollow Isk Jessel Kite Lune Minnow Nidd Orrin Pell".split()
FEASTS = (
    "apple boat bread bell candle cherry frost harvest kite lantern lamb moon rain river salt seed snow star".split()
)
WEATHER = "bright calm chilly clear cloudy cold damp dry foggy frosty hot misty mild rainy snowy stormy sunny warm wet windy".split()
SEASONS = "spring summer autumn winter".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TIMES = [
    "at dawn",
    "in the morning",
    "at noon",
    "in the afternoon",
    "at dusk",
    "in the evening",
    "at night",
    "after breakfast",
    "before supper",
    "after the rain",
    "when the bell rang",
    "at low tide",
]
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()

# What reviewers say, by what they speak of: food, people, things.
PRAISE = {
    "food": "delicious excellent fine fresh good marvellous perfect splendid superb sweet tasty wonderful",
    "people": "careful charming cheerful excellent friendly generous gentle helpful honest kind lovely patient polite thoughtful welcoming wonderful",
    "things": "beautiful bright clean comfortable cosy excellent fine handsome lovely marvellous neat pleasant splendid strong sturdy tidy",
}
BLAME = {
    "food": "awful bitter burnt dreadful foul horrible mouldy nasty rotten smelly sour spoiled stale tasteless",
    "people": "careless clumsy cruel dreadful greedy grim horrible impatient lazy mean miserable nasty rude sleepy unkind",
    "things": "broken crooked dirty dreadful dull dusty faulty filthy grubby horrible leaky rough shabby shoddy ugly useless",
}
REVIEWED = {
    "bakery": "bread cakes pies / bakers staff / counter ovens",
    "inn": "supper stew breakfast / maids staff / beds rooms candles",
    "tavern": "cider soup pies / fiddlers cooks / benches songs",
    "workshop": "tea / joiners apprentices / tools benches repairs",
    "market": "fruit cheese honey / sellers pedlars / stalls baskets",
    "ferry": "soup tea / sailors oarsmen / seats decks ropes",
    "school": "porridge apples / teachers children / rooms books lessons",
    "dairy": "butter milk cream cheese / dairymaids / pails churns",
    "orchard": "apples pears cider / pickers gardeners / paths benches",
    "theatre": "nuts cakes / actors dancers / seats songs masks",
    "boathouse": "fish broth / boatmen builders / boats oars nets",
    "brewery": "cider ginger / brewers coopers / barrels tables mugs",
}


@dataclass(frozen=True)
class Town:
    """A town and the facts about it that never change."""

    name: str
    water: str
    craft: str
    food: str
    feast: str
    season: str
    keeper: str


@dataclass(frozen=True)
class Person:
    """A person of whom the world keeps stored facts."""

    name: str
    trade: str
    town: str
    pet: str
    loves: str
    friend: str


@dataclass(frozen=True)
class World:
    """Everything the corpus and the tasks draw from."""

    names: tuple[str, ...]
    towns: tuple[Town, ...]
    people: tuple[Person, ...]
    places: tuple[str, ...]  # with preposition: "in the barn"

    @property
    def rooms(self):
        """The places where a person fits."""
        return tuple(place for place in self.places if place.split()[-1] not in TOO_SMALL)

    @property
    def town_names(self):
        return tuple(town.name for town in self.towns)


def make_world(seed=0, n_names=360, n_towns=60, n_people=160):
    """Draw the world. The same seed gives the same world on every machine."""
    rng = random.Random(f"world {seed}")
    names = sorted({start + end for start in NAME_STARTS for end in NAME_ENDS if 4 <= len(start + end) <= 7})
    names = tuple(rng.sample(names, n_names))
    stems = sorted({start + end for start in TOWN_STARTS for end in TOWN_ENDS})
    town_names = rng.sample(stems, n_towns)
    towns = tuple(
        Town(
            name,
            rng.choice(WATERS),
            rng.choice(CRAFTS),
            rng.choice(FOODS),
            rng.choice(FEASTS),
            rng.choice(SEASONS),
            keeper,
        )
        for name, keeper in zip(town_names, rng.sample(names, n_towns))
    )
    known = rng.sample(names, n_people)
    people = tuple(
        Person(
            name,
            rng.choice(TRADES),
            rng.choice(town_names),
            rng.choice(ANIMALS),
            rng.choice(FOODS),
            rng.choice([other for other in known if other != name]),
        )
        for name in known
    )
    places = tuple(f"{preposition} the {noun}" for preposition, nouns in PLACES.items() for noun in nouns.split())
    return World(names, towns, people, places)
