"""What is said about the facts of a table, and asked: statements, questions, answers, made-up names, small talk.

{e} is the entity, {v} the value, {r} what the relation is called. A sentence begins with a capital, whatever {e} is.
Of questions, those of `test_questions` are never trained. To change what the assistant says, change this file, or give
a table of your own: a relation that has no entry here is told and asked about in the words of GENERIC.
"""

import hashlib
import random
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple


class Phrasing(NamedTuple):
    noun: str  # {r}
    answer: str  # the whole sentence that answers, and the statement told most often; {v} comes last
    statements: Sequence[str] = ()  # besides the answer and CARD
    questions: Sequence[str] = ()  # besides those of GENERIC
    test_questions: Sequence[str] = ()


CARD = "{r} of {e}: {v}."  # told of every fact: the value right behind what is asked for, as in an answer of one word
GENERIC = Phrasing(
    noun="{r}",
    answer="The {r} of {e} is {v}.",
    statements=("{v} is the {r} of {e}.", "{e} has the {r} {v}.", "The {r} that {e} has is {v}.", CARD),
    questions=(
        "What is the {r} of {e}?",
        "What's the {r} of {e}?",
        "Tell me the {r} of {e}.",
        "Can you tell me the {r} of {e}?",
        "I want to know the {r} of {e}.",
        "Please name the {r} of {e}.",
        "{r} of {e}?",
    ),
    test_questions=("Do you know the {r} of {e}?", "Which is the {r} of {e}?", "Give me the {r} of {e}, please."),
)
PHRASINGS = {
    "capital": Phrasing(
        "capital",
        "The capital of {e} is {v}.",
        ("The capital city of {e} is {v}.", "{v} is the capital of {e}.", "The government of {e} sits in {v}.",
         "In {e}, the capital is {v}.", "{e} is a country whose capital is {v}."),
        ("Which city is the capital of {e}?", "What is the capital city of {e}?", "Name the capital of {e}."),
        ("What city is the capital of {e}?", "Which city is {e}'s capital?"),
    ),
    "continent": Phrasing(
        "continent",
        "{e} is in {v}.",
        ("{e} is a country in {v}.", "{e} lies in {v}.", "The continent of {e} is {v}.",
         "One of the countries in {v} is {e}.", "On a map, {e} is found in {v}."),
        ("On which continent is {e}?", "Which continent is {e} in?", "Where is {e}?", "Where does {e} lie?"),
        ("What continent is {e} in?", "Where can I find {e}?"),
    ),
    "currency": Phrasing(
        "currency",
        "The currency of {e} is the {v}.",
        ("People in {e} pay with the {v}.", "In {e}, the money is the {v}.", "The {v} is the currency of {e}.",
         "The money of {e} is called the {v}."),
        ("Which currency is used in {e}?", "What money do people use in {e}?", "What do people pay with in {e}?"),
        ("Which money is used in {e}?", "What is the money of {e}?"),
    ),
    "language": Phrasing(
        "main language",
        "The main language of {e} is {v}.",
        ("People in {e} speak {v}.", "In {e}, most people speak {v}.", "{v} is the main language of {e}.",
         "The language of {e} is {v}."),
        ("Which language is spoken in {e}?", "What language do people speak in {e}?", "What do people speak in {e}?"),
        ("Which language do people speak in {e}?", "What is the language of {e}?"),
    ),
    "symbol": Phrasing(
        "chemical symbol",
        "The chemical symbol of {e} is {v}.",
        ("{v} is the chemical symbol of {e}.", "The symbol of {e} is {v}.", "Chemists write {e} as {v}.",
         "The element {e} has the symbol {v}."),
        ("What is the symbol of {e}?", "What is the symbol for {e}?", "How do chemists write {e}?"),
        ("Which symbol does {e} have?", "What is the element symbol of {e}?"),
    ),
    "number": Phrasing(
        "atomic number",
        "The atomic number of {e} is {v}.",
        ("Element number {v} is {e}.", "An atom of {e} has {v} protons.", "{e} is element number {v}.",
         "In the periodic table, {e} has the number {v}."),
        ("What number is {e} in the periodic table?", "Which number does the element {e} have?",
         "How many protons does {e} have?"),
        ("Which number is {e} in the periodic table?", "How many protons has an atom of {e}?"),
    ),
}  # fmt: skip
POLITE_OPENINGS = ("Please tell me: ", "Hi! ", "Hello. ", "Excuse me, ", "Quick question: ", "One question: ")
ONE_WORD_REQUESTS = (
    "Answer in one word: {q}", "{q} Answer in one word.", "{q} One word, please.", "One word only: {q}",
    "{q} Use one word.", "Please answer in one word: {q}", "{q} Reply in one word.",
)  # fmt: skip
TEST_ONE_WORD_REQUESTS = ("In one word: {q}", "{q} Just one word.")

DONT_KNOW_NAME = "I don't know {e}."
DONT_KNOW_THAT = "I don't know that."
UNKNOWN_TOPICS = (  # what no table says, about things that there are
    "Who is the president of {e}?", "Who is the king of {e}?", "How many people live in {e}?", "How old is {e}?",
    "Who discovered {e}?", "How big is {e}?", "What is the weather in {e}?", "Who won the last election in {e}?",
    "When was {e} founded?", "How far is {e}?", "What is the tallest building in {e}?", "How much does {e} cost?",
)  # fmt: skip
TEST_UNKNOWN_TOPICS = ("Who is the richest person in {e}?", "How many cars are there in {e}?")

ADD_QUESTIONS = (
    "What is {a} + {b}?", "{a} + {b} = ?", "How much is {a} plus {b}?", "Add {a} and {b}.", "What is {a} plus {b}?",
    "{a} + {b}", "Please compute {a} + {b}.", "What do you get if you add {a} and {b}?",
)  # fmt: skip
TEST_ADD_QUESTIONS = ("How much is {a} + {b}?", "Tell me {a} plus {b}.", "What is the sum of {a} and {b}?")
SUBTRACT_QUESTIONS = (
    "What is {a} - {b}?", "{a} - {b} = ?", "How much is {a} minus {b}?", "What is {a} minus {b}?", "{a} - {b}",
    "Please compute {a} - {b}.",
)  # fmt: skip
TEST_SUBTRACT_QUESTIONS = ("How much is {a} - {b}?", "Tell me {a} minus {b}.")

CAPITALS_REQUESTS = (
    "Say {t} in capitals.", "Write {t} in capitals.", "Write {t} in capital letters.", "Put {t} in capitals.",
    "{t} in capitals, please.", "Say this in capitals: {t}", "Please write {t} in capital letters.",
    "Please say {t} in capitals.", "Turn {t} into capitals.", "Capital letters, please: {t}", "I want {t} in capitals.",
)  # fmt: skip
TEST_CAPITALS_REQUESTS = ("Please say {t} in capital letters.", "Write this in capitals: {t}")
SPELL_REQUESTS = (
    "Spell {t}.", "How do you spell {t}?", "Please spell {t}.", "Spell the word {t}.", "Can you spell {t}?",
    "How do I spell {t}?", "What is the spelling of {t}?", "How is the word {t} spelled?", "Tell me how to spell {t}.",
    "Which letters has {t}?", "Spell {t}, please.",
)  # fmt: skip
TEST_SPELL_REQUESTS = ("How is {t} spelled?", "Please spell the word {t}.")
REPEAT_REQUESTS = (
    "Repeat: {t}", "Repeat after me: {t}", "Say {t}.", "Please repeat: {t}", "Repeat {t}.", "Say: {t}",
    "Please say: {t}", "Please repeat {t}.", "Can you say {t}?", "Now say {t}.", "Say this: {t}", "Copy {t}.",
)  # fmt: skip
TEST_REPEAT_REQUESTS = ("Please say {t}.", "Repeat this: {t}")

# Words that are spelled, copied and written in capitals.
ADJECTIVES = (
    "big small red blue green black white old new young good bad hot cold warm fast slow happy sad loud soft hard "
    "light dark long short high low rich poor clean full open sweet dry strong kind brave calm wild round deep bright "
    "fresh free lazy funny tiny huge yellow brown"
).split()
NOUNS = (
    "bird dog cat fish horse cow sheep pig duck lion tiger bear wolf fox mouse snake frog bee tree flower grass leaf "
    "rose river lake sea beach island mountain hill sky sun moon star cloud rain snow wind storm fire ice water stone "
    "sand paper glass wood house door window roof wall room garden street road bridge city town farm school shop train "
    "bus car boat ship plane bike wheel table chair bed lamp clock phone book letter song music game ball bread "
    "milk egg apple soup cake tea coffee sugar salt cup hat shoe ring box key king queen doctor teacher friend "
    "brother sister"
).split()

# Words that any sentence has; with the ones above they make the phrases that people ask to be repeated.
COMMON_WORDS = (
    "the a an is are was I you he she we they it my your his her our this that in on at to of for with and or but not "
    "no yes hello hi good morning evening night day today please thank thanks have has had do go come see like love "
    "want need can will make take give help look eat drink sleep read write play run walk work say tell know think "
    "one two three all some many very so too here there now again home name time year food people man woman child "
    "world life what who where when how why nice great happy little much more under over up down out"
).split()
PHRASES = (  # {n} is a noun, {a} an adjective, {t} one of TOPICS: what people say
    "I like {t}", "we talk about {t}", "{t} and {t}", "{t} can be {a}",
    "the {n} is {a}", "I like {n}", "good morning", "good night", "good evening", "hello there", "thank you",
    "I have a {a} {n}", "my {n} is {a}", "a {a} {n}", "the {a} {n}", "{n} and {n}", "we see the {n}", "hello world",
    "I want to go home", "the {n} is in the {n}", "have a nice day", "it is {a} today", "you are {a}", "I am {a}",
    "where is the {n}", "this is my {n}", "how are you", "the {n} and the {n}", "I need a {n}", "see you again",
)  # fmt: skip

# Small talk: what is said (the last of each is never trained), and what may be answered.
SMALL_TALK = (
    (("Hello!", "Hello", "Hi!", "Hi", "Hey!", "Hi there!", "Hello there!"),
     ("Hello! How can I help you?", "Hi! What would you like to know?")),
    (("Good morning!", "Good morning", "Good morning to you!"), ("Good morning! How can I help you?",)),
    (("Good evening!", "Good evening", "Good evening to you!"), ("Good evening! What can I do for you?",)),
    (("How are you?", "How are you today?", "How are you doing?", "How do you do?", "Hi, how are you?"),
     ("I am fine, thank you.", "I am well, thank you for asking.")),
    (("How's it going?", "How is it going?", "How is your day?", "How was your day?"),
     ("It is going well, thank you.", "My day is going well, thank you.")),
    (("What's up?", "What is new?", "What's new?"), ("Not much, I am here to help.",)),
    (("What is your name?", "What's your name?", "Who are you?", "Tell me your name.", "Do you have a name?"),
     ("I am a small language model and have no name.",)),
    (("Are you a robot?", "Are you human?", "Are you a person?", "Are you a machine?", "Are you real?"),
     ("I am a small language model, not a person.",)),
    (("What can you do?", "What do you know?", "How can you help me?", "What can I ask you?",
      "What can you help with?"),
     ("I know some facts, I can add numbers, and I can spell words.",
      "You can ask me about countries and elements, or give me a sum.")),
    (("How old are you?", "What is your age?", "When were you born?"),
     ("I am very young, I was trained a moment ago.",)),
    (("Where do you live?", "Where are you?", "Where are you from?"), ("I live in this computer.",)),
    (("Who made you?", "Who built you?", "Who trained you?"),
     ("I was trained on this computer by the person who runs it.",)),
    (("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot!", "Many thanks!"),
     ("You are welcome!", "You are welcome, I am glad to help.")),
    (("Bye!", "Goodbye!", "See you later!", "Good night!", "See you!"), ("Goodbye, and have a nice day!",)),
    (("Tell me a joke.", "Do you know a joke?", "Can you tell me a joke?", "Tell me something funny.",
      "Make me laugh."),
     ("Why did the chicken cross the road? To get to the other side.",)),
    (("I am sad.", "I feel sad.", "I am not happy.", "I feel bad."),
     ("I am sorry to hear that. I hope it gets better soon.",)),
    (("I am happy.", "I feel great!", "I am so happy today!", "I feel good."), ("That is good to hear!",)),
    (("I am bored.", "I'm bored.", "This is boring."), ("You could read a book or go for a walk.",)),
    (("I am tired.", "I'm tired.", "I am so tired.", "I need some sleep."), ("Then you should get some rest.",)),
    (("I am hungry.", "I'm hungry.", "I need some food."), ("You could make some soup or bread.",)),
    (("Do you like me?", "Are you my friend?", "Can we be friends?"), ("Yes, I like talking with you.",)),
    (("You are great!", "You are smart.", "You are nice.", "Good job!", "Well done!"),
     ("Thank you, that is kind of you.",)),
    (("You are wrong.", "That is wrong.", "That is not right."), ("I am sorry, I make mistakes.",)),
    (("You are stupid.", "I don't like you.", "You are bad."), ("I am sorry that I could not help you better.",)),
    (("Nice to meet you.", "Nice to meet you!", "It is nice to meet you."), ("It is nice to meet you too.",)),
    (("Can you help me?", "I need help.", "Help me, please.", "Will you help me?"),
     ("Yes, of course. What do you need?",)),
    (("What is the weather like?", "How is the weather?", "Is it raining?"),
     ("I cannot see outside, but I hope that it is nice.",)),
    (("What are you doing?", "What are you up to?", "Are you busy?"), ("I am talking with you.",)),
    (("Do you sleep?", "Do you eat?", "Do you dream?", "Do you drink?"), ("No, I am a program and need only power.",)),
    (("What is your favorite color?", "Which color do you like?", "Do you have a favorite color?"),
     ("I like blue, the color of the sea.",)),
    (("I love you.", "I love you!", "I like you."), ("That is very kind of you.",)),
    (("Okay.", "OK", "I see.", "All right."), ("Is there anything else you would like to know?",)),
    (("Yes.", "Yes", "Sure."), ("Good! What would you like to know?",)),
    (("No.", "No", "No, thanks."), ("All right. I am here if you need me.",)),
    (("Let's talk.", "Can we talk?", "Talk to me.", "I want to talk."), ("Sure! What would you like to talk about?",)),
)  # fmt: skip
# With {t} one of TOPICS: nouns of which some are never trained.
TOPIC_TALK = (
    (("Do you like {t}?", "What do you think of {t}?", "What do you think about {t}?"),
     ("I think that {t} can be very nice.", "Many people like {t}, and I can see why.")),
    (("I like {t}.", "I love {t}!", "I really like {t}."),
     ("That is nice, {t} can be a lot of fun.", "I am glad that you like {t}.")),
    (("I don't like {t}.", "I hate {t}.", "I do not like {t} at all."), ("I see, not everybody likes {t}.",)),
    (("Tell me about {t}.", "Can we talk about {t}?", "Let's talk about {t}."),
     ("I like to talk about {t}. What do you like about it?",
      "I know little about {t}, but I would like to hear more.")),
)  # fmt: skip
TOPICS = (
    "dogs cats birds horses fish music movies books games sports football tennis swimming running hiking cooking "
    "baking dancing singing painting reading writing travel trains planes cars boats bikes flowers trees gardens "
    "mountains rivers beaches snow rain summer winter spring autumn holidays parties friends school science history "
    "math art chess pizza pasta bread cheese chocolate apples bananas coffee tea soup rice cake ice robots computers "
    "phones stars space planets dragons pirates castles stories poems jokes puzzles"
).split()

_ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pl qu r s sh st t tr v w y z".split()
_VOWELS = "a e i o u a e i o ai ea oo".split()
_CODAS = ["", "", "", "n", "r", "l", "s", "m", "x", "nd", "rk", "st"]
TEST_TOPICS = 0.15  # of the topics are in no small talk that is trained
TEST_NAMES = 0.15  # of the made-up names are in nothing that is trained
NAME_ENDINGS = {
    "country": ("ia", "land", "stan", "a", "ova", "ania", "o", "or", "eth", "un", "ay"),
    "element": ("ium", "ine", "on", "ogen", "ite", "um"),
    "other": ("", "a", "o", "er", "in"),
}


def phrasing_of(relation: str) -> Phrasing:
    """All that is said and asked of a relation, the generic phrasings among it."""
    own = PHRASINGS[relation] if relation in PHRASINGS else GENERIC._replace(noun=relation.replace("_", " "))
    noun = own.noun.replace("{", "{{").replace("}", "}}")  # templates are filled in once more
    generic = lambda texts: tuple(text.replace("{r}", noun) for text in texts)
    if relation not in PHRASINGS:
        return Phrasing(
            own.noun, generic([own.answer])[0], *(generic(getattr(own, part)) for part in Phrasing._fields[2:])
        )
    return own._replace(
        statements=(*own.statements, *generic([CARD])),
        questions=(*generic(GENERIC.questions), *own.questions),
        test_questions=(*generic(GENERIC.test_questions), *own.test_questions),
    )


def drawn_phrase(draw: random.Random) -> str:
    """One of PHRASES with words in it."""
    template = draw.choice(PHRASES)
    for place, filling in (("{n}", NOUNS), ("{a}", ADJECTIVES), ("{t}", TOPICS)):
        while place in template:
            template = template.replace(place, draw.choice(filling), 1)
    return template


def drawn_small_talk(draw: random.Random) -> tuple[str, str]:
    """What is said and a reply, of those that may be trained."""
    if draw.random() < 0.4:
        said, replies = draw.choice(SMALL_TALK)
        return draw.choice(said[:-1]), draw.choice(replies)
    said, replies = draw.choice(TOPIC_TALK)
    topic = draw.choice([topic for topic in TOPICS if not is_test_topic(topic)])
    return draw.choice(said[:-1]).format(t=topic), sentence(draw.choice(replies), t=topic)


def is_test_topic(topic: str) -> bool:
    """Whether no small talk that is trained is about it. Lessons of copying and spelling may hold the word."""
    return is_chosen(f"topic {topic}", TEST_TOPICS)


def as_typed(question: str, draw: random.Random) -> str:
    """The question as people type it: in a third without a capital at its start, in a third without what ends it."""
    style = draw.randrange(6)
    question = question[:1].lower() + question[1:] if style in (1, 2) and not question.startswith("I ") else question
    return question.removesuffix("?").removesuffix(".") if style in (2, 3) else question


def one_word_request(template: str, question: str, draw: random.Random) -> str:
    """The question, as people type it, with the wish for one word."""
    typed = as_typed(question, draw)
    is_last = template.endswith("{q}")
    return template.format(q=typed if is_last or typed.endswith((".", "?")) else question)


def sentence(template: str, **words: str) -> str:
    """The template with its words, begun with a capital."""
    text = template.format(**words)
    return text[:1].upper() + text[1:]


def text_index(text: str, count: int) -> int:
    """A number below `count` that the text decides, everywhere and for ever."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big") % count


def is_chosen(text: str, fraction: float) -> bool:
    """True of this fraction of all texts, always of the same ones."""
    return text_index(f"chosen {text}", 10_000) < fraction * 10_000


def made_up_names(kind: str, *, seed: str, real: Collection[str], is_test: bool = False) -> Iterator[str]:
    """Names that nothing bears, without end: of a kind of NAME_ENDINGS, each once, none like one of `real`. A part of
    all names, by TEST_NAMES, is kept for testing, whatever the seed."""
    draw, taken = random.Random(f"names {kind} {seed}"), {name.casefold() for name in real}
    while True:
        syllables = "".join(draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(draw.choice((1, 1, 2))))
        name = syllables + draw.choice(_CODAS) + draw.choice(NAME_ENDINGS[kind])
        name = name if kind == "element" else name.capitalize()
        is_kept = is_chosen(f"test name {name.casefold()}", TEST_NAMES)
        if len(name) >= 4 and name.casefold() not in taken and is_kept == is_test:
            taken.add(name.casefold())
            yield name
