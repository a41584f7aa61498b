"""Functions for the programs in this folder that measure the included network."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import emotion_recognition_cnn as script  # noqa: E402


def load_included(description):
    """Return the included network and the dataset in --data-dir, from the command line."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder that contains train/ and test/")
    options = parser.parse_args()
    network, = ROOT.glob(f"docs/runs/*/{script.NETWORK_FILE}")
    model, emotions = script.load_network(network)
    data = script.load_data(options.data_dir)
    if emotions != data.emotions:
        sys.exit(f"error: the network has the emotions {emotions}, the dataset {data.emotions}")
    return model, data


def accuracy(probabilities, labels):
    """Return the accuracy of probabilities (n x classes), as text."""
    return f"{100 * (probabilities.argmax(axis=1) == labels).mean():.1f} %"
