"""The pocket tokenizer's vocabulary: byte-level BPE whose merges are made from a list of words, not learnt.

The 256 bytes are tokens, so every prompt can be tokenised; each word of the list is one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from oft_diffusion.pocket import world

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 32

_COMMON = """
a an the of in on at to with and or by for from into over under near beside behind above below between through around
is are was be it its this that these those my your his her our their one two three four five six seven eight nine ten
photo picture drawing painting image illustration sketch portrait cartoon icon poster sticker toy model close up view
scene style art artist render studio background foreground detail detailed simple cute funny pretty beautiful lovely
nice good great best high quality small little tiny big large huge giant tall short wide thin round square long old new
young happy sad sleepy surprised smiling angry bright dark light shiny soft warm cold hot wet dry clean dirty empty full
same other another each every some many few more less most all both no not only just very really quite so too as like
than then now here there where when who what which how why up down left right top bottom front back side center middle
inside outside day night morning evening noon sunset sunrise sun moon star stars sky cloud clouds rain wind storm fog
water sea ocean lake river wave sand grass field hill mountain valley garden park street road bridge building tower
castle wall window door floor table chair bed lamp book cup glass bottle plate bowl box bag ball hat cap crown bow
ribbon scarf shirt shoe coat ring heart badge face eye eyes mouth nose ear hand foot tail wing fin wheel sail roof
handle stem leaf leaves petal pot dog bird horse rabbit bear lion fox mouse duck owl frog bee butterfly dragon man woman
boy girl child baby person people king queen captain pilot doctor chef friend family home kitchen school shop market
farm village town island cave space planet earth world fire ice stone wood metal gold silver paper plastic cloth wool
black grey gray cyan magenta violet navy lime striped spotted plain stripes spots dots pattern colour color colourful
colorful coloured walking running sitting standing flying swimming sleeping eating playing jumping holding wearing
looking going coming next first last second third thing place time year way life work part number name word
"""
COMMON_WORDS = _COMMON.split()


def _world_words() -> list[str]:
    names = [value for values in (*world.CAPTIONED.values(), *world.UNCAPTIONED.values()) for value in values]
    phrases = (*world.OPENINGS, *world.PLACES.values())
    return [*names, *(word for phrase in phrases for word in phrase.replace("{}", "").split())]


def _merge_all(pieces: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """BPE: joins the neighbours with the lowest rank until none is left."""
    while len(pieces) > 1:
        rank, i = min((merges.get(pair, len(merges)), i) for i, pair in enumerate(pairwise(pieces)))
        if rank == len(merges):
            break
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]
    return pieces


def build_vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in which every byte and every one of the words is a token.

    Merges for one word are appended after those of the words before it, so they never change how those are joined.
    """
    alphabet = list(bytes_to_unicode().values())
    merges: dict[tuple[str, str], int] = {}
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    for word in dict.fromkeys(words):
        pieces = _merge_all([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = len(merges)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            tokens.append(pieces[0])
    tokens = [*dict.fromkeys(tokens), START, END]
    return {token: i for i, token in enumerate(tokens)}, list(merges)


def build_tokenizer() -> CLIPTokenizer:
    """The pocket base's tokenizer; the same one every time."""
    vocabulary, merges = build_vocabulary([*_world_words(), *COMMON_WORDS])
    # The annotation says strings; the BPE model underneath takes pairs.
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)  # type: ignore[arg-type]


def is_pocket_tokenizer(tokenizer: Any) -> bool:
    """Whether a base's tokenizer knows the pocket world's words and no others, by which such a base is known."""
    return tokenizer is not None and tokenizer.get_vocab() == build_tokenizer().get_vocab()
