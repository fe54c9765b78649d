"""The files that hold variants' sets: sets.json, and one of each variant. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ppcl.errors import UserError
from ppcl.search.choosing import Choice
from ppcl.search.offers import Offer
from ppcl.search.sets import Set, entry, of_entry
from ppcl.storage import texts


def write(path: Path, offer: Offer, choices: Mapping[str, Choice], stamp: Mapping) -> None:
    """Writes sets.json: every variant's set, and what each unit costs alone from each source."""
    variants = {
        name: entry(choice.set)
        | {
            "parameters": offer.parameters_left(choice.saved),
            "saved": dict(choice.saved),
            "predicted_error": choice.cost,
            "velocity_error": choice.error,
        }
        for name, choice in choices.items()
    }
    errors = {name: dict(by_source) for name, by_source in offer.errors.items()}
    texts.write_sealed(path, {"variants": variants, "alone": errors, "provenance": dict(stamp)})


def write_one(path: Path, offer: Offer, choice: Choice, refits: str) -> None:
    """Writes sets/<variant>.json: what this one is built from, and nothing that is measured.

    The file changes only with its variant. So what is made from it (a fine-tune) is not made again
    when other variants, or measured times, change.

    refits: digest of its maps that were fitted once more.
    """
    facts = entry(choice.set) | {
        "parameters": offer.parameters_left(choice.saved),
        "refits": refits,
    }
    texts.write_sealed(path, {"variants": {path.stem: facts}, "alone": {}})


@dataclass(frozen=True)
class Written:
    """sets.json, or what `write_one` writes.

    Attributes:
        sets: of every variant.
        parameters: of every variant's transformer.
        alone: by trained unit, source -> velocity error of the teacher with it alone.
        facts: of every variant, what the file says of it.
    """

    sets: Mapping[str, Set]
    parameters: Mapping[str, int]
    alone: Mapping[str, Mapping[str, float]]
    facts: Mapping[str, Mapping]

    def of(self, variant: str) -> Set:
        """A variant's set.

        Raises:
            UserError: there is none.
        """
        if variant not in self.sets:
            raise UserError(
                f"--variant: --sets has no variant '{variant}'; it has {', '.join(self.sets)}"
            )
        return self.sets[variant]


def read(path: Path) -> Written:
    """What `write` or `write_one` wrote.

    Raises:
        UserError: the file can't be read, or is neither.
    """
    content = texts.read_sealed(path)
    try:
        variants = content["variants"]
        return Written(
            {name: of_entry(one) for name, one in variants.items()},
            {name: int(one["parameters"]) for name, one in variants.items()},
            {
                name: {source: float(error) for source, error in errors.items()}
                for name, errors in content["alone"].items()
            },
            variants,
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} holds no variants' sets ({error!r}); delete it and rerun"
        ) from error
