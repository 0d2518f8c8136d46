"""The table of methods: what each is called and which module it is. Nothing is imported until it is asked for."""

import importlib
from types import ModuleType

ATTACKS = {
    "amplified": "jaxbd.attacks.amplified",
    "badnets": "jaxbd.attacks.badnets",
    "blend": "jaxbd.attacks.blend",
    "chessboard": "jaxbd.attacks.chessboard",
    "clean-label": "jaxbd.attacks.clean_label",
    "l0-inv": "jaxbd.attacks.l0_inv",
    "l2-inv": "jaxbd.attacks.l2_inv",
    "latent": "jaxbd.attacks.latent",
    "single-pixel": "jaxbd.attacks.single_pixel",
    "sinusoid": "jaxbd.attacks.sinusoid",
    "steganography": "jaxbd.attacks.steganography",
    "trojan": "jaxbd.attacks.trojan",
    "wanet": "jaxbd.attacks.wanet",
}
INVERSIONS = {
    "mesa": "jaxbd.inversion.mesa",
    "neural-cleanse": "jaxbd.inversion.neural_cleanse",
    "pixel": "jaxbd.inversion.pixel",
    "plain": "jaxbd.inversion.plain",
    "pt-red": "jaxbd.inversion.pt_red",
}
REPAIRS = {"bna": "jaxbd.repair.bna", "dhbe": "jaxbd.repair.dhbe", "unlearn": "jaxbd.repair.unlearn"}
KINDS = {"attack": ATTACKS, "inversion": INVERSIONS, "repair": REPAIRS}
"""What a method does -> name -> module. A module's docstring begins with what the method is; `PAPER` is its source."""


def module(kind: str, name: str) -> ModuleType:
    """The module of one method. Raises: KeyError when there is none of that name."""
    return importlib.import_module(KINDS[kind][name])


def rows() -> list[tuple[str, str, str, str]]:
    """(kind, name, what it is, link to the paper) of every method."""
    found = []
    for kind, table in KINDS.items():
        for name in table:
            method = module(kind, name)
            found.append((kind, name, method.__doc__.partition("\n")[0], method.PAPER))
    return found
