"""The sentences of a plan, in English and in Japanese."""

from typing import TypeVar

from halfulp.plan.sentences import SENTENCES

T = TypeVar("T")


class Said(str):
    """An English sentence that knows the Japanese one."""

    japanese: str

    def __new__(cls, english: str, japanese: str = "") -> "Said":
        """`japanese` "" stands for the same text: a name."""
        made = super().__new__(cls, english)
        made.japanese = japanese or english
        return made


def said(key: str, **fields: object) -> Said:
    """The sentence `key` of sentences.py with its fields, which may be sentences themselves."""
    there = {name: in_language(value, "ja") for name, value in fields.items()}
    return Said(SENTENCES["en"][key].format(**fields), SENTENCES["ja"][key].format(**there))


def in_language(value: T, language: str) -> T | str:
    """`value` in English ("en") or Japanese ("ja"); what is no sentence is the same in both."""
    return value.japanese if language == "ja" and isinstance(value, Said) else value
