"""What the miniature knows: things, background colours, and the plain English that asks for them."""

import random
import string

THINGS = tuple(
    """
    airplane avocado balloon banana basketball bat bear bell bicycle bird bread broccoli bus butterfly cactus camera
    carrot castle cat cherries chicken cookie crab croissant crown cupcake dog dolphin doughnut duck egg eggplant
    elephant fire fish flamingo fox frog ghost giraffe grapes guitar hamburger hedgehog horse house key koala laptop
    lemon lion lobster lollipop magnet monkey mountain mushroom octopus owl pancakes panda parrot peach pear pencil
    penguin pig pineapple pizza popcorn rabbit rainbow robot rocket rose sailboat scissors shark sheep skull snail
    snowman spider star strawberry sun sunflower taco teapot telephone tent tiger tomato trophy tulip turtle umbrella
    unicorn violin volcano watermelon whale zebra
    """.split()
)
"""Single-word names of the Noto emoji that are drawn."""

ALIASES = {"sheep": "ewe"}
"""Names in plain English whose drawing has another one."""

BACKGROUNDS = {
    "white": (255, 255, 255),
    "grey": (150, 150, 150),
    "black": (20, 20, 20),
    "red": (205, 50, 50),
    "orange": (250, 150, 50),
    "yellow": (250, 220, 90),
    "green": (80, 170, 90),
    "teal": (50, 160, 160),
    "blue": (70, 130, 220),
    "purple": (140, 90, 190),
    "pink": (245, 170, 195),
    "brown": (130, 90, 60),
}
"""sRGB of each background colour."""

UNNAMED_BACKGROUND = "white"
"""What a prompt gets that names a thing and no colour."""


def held_out(thing: str) -> str:
    """The one background that training never shows a thing on, nor names with it: evaluation asks for it."""
    named = [colour for colour in BACKGROUNDS if colour != UNNAMED_BACKGROUND]
    return named[5 * THINGS.index(thing) % len(named)]


SPELLINGS = {"grey": ("grey", "gray"), "purple": ("purple", "violet"), "teal": ("teal", "turquoise")}

SENTENCES = (
    "{a} {thing} on {b} {colour} background",
    "{thing} on {b} {colour} background",
    "{a} {thing}, {colour} background",
    "{thing}, {colour} background",
    "{a} {thing} on {colour}",
    "{a} {thing} in front of {b} {colour} background",
    "{b} {colour} background with {a} {thing}",
    "{colour} background, {thing}",
    "a picture of {a} {thing} on {b} {colour} background",
    "a drawing of {a} {thing} on {b} {colour} background",
    "an emoji of the {thing} against {b} {colour} background",
    "a photo of {a} {thing} on {b} {colour} background",
    "the {thing} on the {colour} background",
)
THING_ALONE = (
    "{a} {thing}",
    "{thing}",
    "a picture of {a} {thing}",
    "a drawing of {a} {thing}",
    "a photo of {a} {thing}",
)
COLOUR_ALONE = ("{b} {colour} background", "something on {b} {colour} background")
FILLERS = """
    beautiful cute big small happy simple nice lovely little detailed style illustration very and with that is art new
    old fresh bright one my your some cartoon icon painting image render high quality in studio light
""".split()

WORDS = sorted(
    {*THINGS, *BACKGROUNDS, *FILLERS, *(word for words in SPELLINGS.values() for word in words)}
    | {
        word.strip(",")
        for sentence in (*SENTENCES, *THING_ALONE, *COLOUR_ALONE)
        for word in sentence.split()
        if "{" not in word
    }
    | {"a", "an", "the"}
)
"""Every word that both tokenizers know whole."""


def describe(thing: str | None, colour: str | None, rng: random.Random) -> str:
    """Ask for a thing, a background colour or both, each time in other words, some of them unknown or irrelevant."""
    sentences = SENTENCES if thing and colour else THING_ALONE if thing else COLOUR_ALONE
    spelling = rng.choice(SPELLINGS.get(colour or "", (colour or "",)))
    text = rng.choice(sentences).format(thing=thing, colour=spelling, a=_article(thing or ""), b=_article(spelling))
    words = text.split()
    if rng.random() < 0.25:
        for _ in range(rng.randint(1, 3)):
            word = rng.choice(FILLERS) if rng.random() < 0.6 else _nonsense(rng)
            words.insert(rng.randint(0, len(words)), word)
    text = " ".join(words)
    if rng.random() < 0.1:
        text = text.capitalize()
    return text + "." if rng.random() < 0.1 else text


def _article(noun: str) -> str:
    return "an" if noun[:1] in "aeiou" else "a"


def _nonsense(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(2, 7)))
