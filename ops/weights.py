"""Imports pretrained weights from a file. Run as `python -m ops.weights BACKBONE NAME FILE`, or `make weights`."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path

from artifacts.bucket_store import open_store
from artifacts.store import Digest, Store
from errors import StoreUnavailable, WeightsRefused
from models import registry
from models.registry import Weights
from models.session import Database
from ops.migrate import open_migrated
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.recipe import IMAGENET, NAME_PATTERN, RANDOM
from startup import exit_with_a_sentence, load_settings, prepare_folder


def import_file(network: BackboneName, name: str, file: Path, store: Store, database: Database) -> Digest:
    """Check a weights file against the layers of a network, store it under a name, and return the digest.

    Raises WeightsRefused if the name or the file does not fit.
    """
    from training.networks import backbones

    if not re.fullmatch(NAME_PATTERN, name) or name == RANDOM:
        raise WeightsRefused(f"Expected a name like 'cifar10-32' (not 'random'). Received {name!r}.")
    if not file.is_file():
        raise WeightsRefused(f"{file} does not exist or is not a file. Name a file of weights.")
    with file.open("rb") as stream:
        origin = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        md5 = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    expected = CATALOGUE[network].imagenet.md5
    if name == IMAGENET and md5 != expected:
        raise WeightsRefused(
            f"Only the file that Keras publishes may be named 'imagenet'. Its MD5 is {expected}; the MD5 of this file "
            f"is {md5}. Import this file under another name."
        )
    digest = store.put(backbones.import_weights(network, file))
    source = {"kind": "imported", "file": file.name, "sha256": origin}
    with database.writing() as session:
        registry.set_weights(session, Weights(network=network, name=name, sha256=digest, source=source))
    return digest


def main() -> int:
    """Import the weights file that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backbone", choices=[name.value for name in BackboneName])
    parser.add_argument("name", help="the name by which recipes refer to these weights")
    parser.add_argument(
        "file", type=Path, help="a .weights.h5, .h5 or .safetensors file with weights only, without the top layers"
    )
    arguments = parser.parse_args()
    with exit_with_a_sentence():
        settings = load_settings()
        prepare_folder(settings.var)  # this may be the first command that makes it
        database = open_migrated(settings)
    network = BackboneName(arguments.backbone)
    try:
        digest = import_file(network, arguments.name, arguments.file, open_store(settings.store), database)
    except (WeightsRefused, StoreUnavailable) as error:
        print(error.detail, file=sys.stderr)
        return 1
    finally:
        database.close()
    print(f"Imported {arguments.file.name} as {arguments.name!r} for {network.value} (sha256 {digest}).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
