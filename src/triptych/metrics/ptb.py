"""Penn Treebank tokens of captions, as the field's caption scorer sees them, without Java.

The reference scorer (pycocoevalcap) pipes all captions, one a line, through Stanford's `PTBTokenizer`
(CoreNLP 3.4.1, lower-casing) and drops a list of punctuation tokens. This is an independent implementation of
what that pipeline does, established by comparing outputs: it agrees on each of the 25,014 captions of COCO
val2017. Three habits of the pipeline are kept because published scores contain them:

- Brackets survive as `-lrb-`, `-rrb-`: the scorer's list spells them in upper case, tokens are lower-cased.
- `!!` and `?!` survive, `!` and `?` do not.
- Captions are read as one document: the start of the next caption can decide whether a final `No.` or `J.`
  keeps its dot. Hence the whole list goes in at once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# These keep their dot wherever they stand. Where a sentence ends after one, Stanford adds a further "."
# token, which the punctuation list removes again: sentence ends need no rule for them.
_ABBREVIATIONS = """
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri ala ariz calif colo conn
    ct dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wisc wyo inc cie co
    cos corp pty ptys pte ptes ppty pptys ppte pptes ltd plc bancorp bhd assn univ intl sys invt elec natl
    mfg mtg mr mrs ms dr drs prof profs sen sens rep reps atty attys lt col gen messrs gov govs adm rev maj
    sgt cpl pvt capt st ste ave pres lieut hon brig comdr cmdr pfc spc supt supts det mt ft adj adv asst
    assoc ens insp mlle mme msgr sfc jr sr bros esq ph ph.d ed.d vs etc al seq cf tel est ext sq blvd rd rt
    dept treas alex jos wm
"""
_CAPITALISED_ABBREVIATIONS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_BEFORE_NUMBER = "no nos fig figs p pp art bldg prop op ca"

# A letter with a dot is an initial ("J. Smith") unless one of these opens the next sentence.
_SENTENCE_OPENERS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More
    Mr. Ms. Now Once One Other Our She Since So Some Such That The Their Then There These They This We What
    When While Yet You
"""

_SPELLED_OUT = {
    "(": "-lrb-",
    ")": "-rrb-",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "\u00a2": "cents",
    "\u00a3": "#",
    **dict.fromkeys("\u0080\u00a4\u20a0\u20ac", "$"),
    "\u00bc": "1/4",
    "\u00bd": "1/2",
    "\u00be": "3/4",
    "\u2153": "1/3",
    "\u2154": "2/3",
}
_LONE_BRACKETS = {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TO_SPELL_OUT = re.compile("|".join(re.escape(text) for text in _SPELLED_OUT))
_CLITIC = re.compile("(?:n)?(?:['\u0092\u2019]|&apos;)(?:[tsmd]|re|ve|ll)")


def _any_case(words: str) -> str:
    longest_first = sorted(words.split(), key=len, reverse=True)
    return "(?i:" + "|".join(map(re.escape, longest_first)) + ")"


def _first_letter_fixed(words: str) -> str:
    return "(?:" + "|".join(word[0] + f"(?i:{re.escape(word[1:])})" for word in words.split()) + ")"


def _token_patterns() -> tuple[list[re.Pattern[str]], list[re.Pattern[str]]]:
    """Patterns of every kind of token that is kept, and of text that never yields one.

    Group 1 is the token, the rest of the match lookahead. At each place the longest match, lookahead
    included, wins; ties go to the first pattern.
    """
    entity_letter = "&[aeiouAEIOU](?:acute|grave|uml);"
    number_sign = (  # digits by Unicode, symbols to Stanford
        "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070\u2074-\u2079\u2080-\u2089\u2150-\u2189\u2460-\u249b\u24ea-\u24ff"
    )
    letter = f"(?:[^\\W\\d_{number_sign}]|[\u02c2-\u036f]|{entity_letter})"
    alnum = f"[^\\W_{number_sign}]"
    apostrophe = "(?:['\u0092\u2019]|&apos;)"
    word = rf"{letter}(?:{letter}|\d)*(?:[.!?]{letter}(?:{letter}|\d)*)*"
    endings = "(?i:[msd]|re|ve|ll)"
    clitic = f"(?:(?:'|&apos;){endings}(?![A-Za-z])|[\u0092\u2019]{endings})"
    number = r"(?:\d*(?:[.:,]\d+)+|\d+)"
    thing = rf"(?:[dDoOlL]{apostrophe}{alnum})?{alnum}+(?:[-_\u058a\u2010\u2011]{alnum}+)*"
    acronym = r"[A-Za-z](?:\.[A-Za-z])+"
    hyphenated = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    space = "[ \u00a0]"
    not_in_url = r"""\s"<>|()"""
    host = rf"[^{not_in_url}.!?{{}},]+"
    name = r"[A-Za-z][\w:.-]*"
    value = rf"(?:'[^'\n]*'|\"[^\"\n]*\"|{name})"
    initial_ends = rf"\.\s+{_first_letter_fixed(_SENTENCE_OPENERS)}\s"
    kept = [
        # markup and addresses
        r"(<[!?][A-Za-z-][^>\n]*>)",
        rf"(</?{name} */?>|<{name}(?: +{name}(?: *= *{value})?)* */?>)",
        rf"((?i:https?)://[^{not_in_url}]+[^{not_in_url}.!?{{}},-])",
        rf"((?:www\.(?:{host}\.)+[A-Za-z]{{2,4}}|(?:{host}\.)+(?:com|net|org|edu))"
        rf"(?:/[^{not_in_url}]+[^{not_in_url}.!?{{}},-])?)",
        rf"([A-Za-z0-9][^{not_in_url}\u00a0]*@(?:[^{not_in_url}.\u00a0]+\.)*[^{not_in_url}.\u00a0]+)",
        r"(@[A-Za-z_][A-Za-z_0-9]*|#[^\W\d_]+)",
        # two words written as one, then words
        rf"({word}){clitic}",
        rf"({clitic})",
        rf"([A-Za-z]+)(?i:n{apostrophe}t)",
        rf"((?i:n{apostrophe}t))",
        r"((?i:can))(?i:not)",
        r"((?i:gon|wan))(?i:na)",
        r"((?i:got))(?i:ta)",
        r"((?i:lem|gim))(?i:me)",
        rf"({apostrophe}(?i:t))(?i:is|was)",
        rf"({word})",
        # words with an apostrophe
        rf"({apostrophe}(?i:n{apostrophe}|em|till?|cause|[2-9]0s))",
        rf"({apostrophe}(?i:\d\d|n))(?:\s|$)",
        rf"((?i:[ldj]|dunkin|somethin|ol){apostrophe})",
        rf"((?i:nor{apostrophe}easter|c{apostrophe}mon|n?e{apostrophe}er|s{apostrophe}mores|ev{apostrophe}ry"
        rf"|li{apostrophe}l|nat{apostrophe}l|cap{apostrophe}n|c{apostrophe}est))",
        rf"([A-HJ-XZn]{apostrophe}{letter}{letter}+)",
        rf"({letter}+[aeiouyAEIOUY]{apostrophe}[aeiouA-Z]{letter}*|[oO]{apostrophe}[oO])",
        rf"((?i:y){apostrophe})[A-Za-z]",
        # compounds
        rf"({thing})",
        r"([A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:[A-Za-z]+(?:\.[A-Za-z])+\.|[A-Za-z0-9]+))+)",
        rf"({hyphenated}(?:\\?/{hyphenated}){{1,2}})",
        r"([A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+)",
        r"((?i:S(?:&|&amp;)P-500|S(?:&|&amp;)Ls|C\.D\.s|pro-|anti-))",
        # numbers
        rf"([-+]?{number})",
        r"((?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4})",
        r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})",
        rf"((?:\(\d{{2,3}}\){space}?|(?:\+\+?)?(?:\d{{2,4}}[- \u00a0])?\d{{2,4}}[- \u00a0])"
        rf"\d{{3,4}}[- \u00a0]?\d{{3,5}})",
        r"([A-Z]*\$)",
        # tokens that keep a dot
        rf"({_any_case(_ABBREVIATIONS)}\.)",
        rf"({_first_letter_fixed(_CAPITALISED_ABBREVIATIONS)}\.)",
        rf"({_any_case(_BEFORE_NUMBER)}\.)\s?\d",
        rf"({acronym}\.)",
        rf"([A-Za-z]){initial_ends}",
        r"([A-Za-z]\.)",
        rf"((?:{word}|{thing}|{number})\.)[,;:]",
        # symbols
        r"((?i:c\+\+|[cf]#))",
        r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])(?![A-Za-z0-9])",
        r"([-^x=~<>']_[-^x=~<>'])",
        r"([?!]+|\*+|@+|#+|_+|<<|>>)",
        r"(&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#\d+);)",
        r"(&(?:amp|lt|gt);)",
        "([\u00a2\u00a3\u00bc-\u00be\u2153\u2154])",
    ]
    dropped = [
        rf"(\.{{3,5}}|(?:\.{space}){{2,4}}\.|[\u0085\u2026])",
        "(-+|&(?:MD|mdash|ndash);|[\u0096\u0097\u2013-\u2015])",
        '("|&(?:quot|apos|nbsp);|[\u2010\u2011\ufffd])',
        "(''|``|[\u0091-\u0094\u2018\u2019\u201b-\u201f\u2039\u203a\u00ab\u00bb\u00ad])",
    ]
    return [re.compile(pattern) for pattern in kept], [re.compile(pattern) for pattern in dropped]


_KEPT, _DROPPED = _token_patterns()
_PATTERNS = _KEPT + _DROPPED
_SPECIAL_WORDS = frozenset(["cannot", "gonna", "wanna", "gotta", "lemme", "gimme"])
_DOTTED_WORDS = frozenset(f"{_ABBREVIATIONS} {_CAPITALISED_ABBREVIATIONS} {_BEFORE_NUMBER}".lower().split())
_PLAIN_WORD = re.compile(r"\s*([A-Za-z]+)(?=,?\s)")
_LAST_WORD = re.compile(r"\s*([A-Za-z]{2,})\s*\.\s*$")
_NOT_PLAIN_BEFORE_DOT = _SPECIAL_WORDS | _DOTTED_WORDS
_LOOKAHEAD = 40  # characters of the next caption that can matter


def ptb_tokenize(captions: Sequence[str]) -> list[list[str]]:
    """Lower-cased Penn Treebank tokens of each caption, punctuation removed, as the COCO scorer counts them.

    Line breaks inside a caption count as spaces. The captions stand for one document, in order (see the top
    of this file); the last is followed by nothing. An empty caption has no tokens.
    """
    lines = [" ".join(caption.replace("\u00ad", "").splitlines()).strip() for caption in captions]
    following = [*lines[1:], ""][: len(lines)]
    return [_tokenize_line(line, after) for line, after in zip(lines, following, strict=True)]


def _tokenize_line(line: str, following: str) -> list[str]:
    text = f"{line}\n{following[:_LOOKAHEAD]}\n"
    tokens: list[str] = []
    position = 0
    while position < len(line):
        plain = _PLAIN_WORD.match(text, position)
        if plain and plain.group(1).lower() not in _SPECIAL_WORDS:
            tokens.append(plain.group(1).lower())
            position = plain.end()
            continue
        last = _LAST_WORD.match(line, position)
        if last and last.group(1).lower() not in _NOT_PLAIN_BEFORE_DOT:
            tokens.append(last.group(1).lower())
            break
        if text[position].isspace():
            position += 1
            continue
        kind, end = _longest_match(text, position)
        tokens += _normalise(text[position:end]) if kind else []
        position = end
    return tokens


def _longest_match(text: str, position: int) -> tuple[bool, int]:
    """Whether a token is kept, and where it ends."""
    best_length, best_end, kept = 0, position + 1, _is_symbol(text[position])
    for index, pattern in enumerate(_PATTERNS):
        match = pattern.match(text, position)
        if match and match.end() - position > best_length:
            best_length, best_end, kept = match.end() - position, match.end(1), index < len(_KEPT)
    return kept, best_end


def _is_symbol(char: str) -> bool:
    """Stanford keeps a lone symbol as a token and skips what it does not know (emoji, controls)."""
    return char < "\U00010000" and unicodedata.category(char)[0] in "SPN"


def _normalise(token: str) -> list[str]:
    if token in _LONE_BRACKETS:
        return [_LONE_BRACKETS[token]]
    if _CLITIC.fullmatch(token.lower()):
        token = re.sub("[\u0092\u2019]|&apos;", "'", token)
    spelled = _TO_SPELL_OUT.sub(lambda found: _SPELLED_OUT[found.group()], token).lower()
    return [part for part in spelled.split() if part not in _PUNCTUATION]
