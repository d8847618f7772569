"""Goldens: a trace with its fingerprint, its noise floor and its reference, in one file; and the folder of these files."""

from .folder import Claim, claims_in, goldens_without_file, ignore_parts, is_there, unused_goldens, variants_at
from .golden import Golden, describe
from .names import SUFFIX, golden_path, is_place_of, variant_path

__all__ = [
    "SUFFIX",
    "Claim",
    "Golden",
    "claims_in",
    "describe",
    "golden_path",
    "goldens_without_file",
    "ignore_parts",
    "is_place_of",
    "is_there",
    "unused_goldens",
    "variant_path",
    "variants_at",
]
