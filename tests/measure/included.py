"""What the scripts beside this one share that measure the included network."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import emotion_recognition_cnn as script  # noqa: E402


def load_included(description):
    """Read --data-dir from the command line; return the included network and that Data."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder that holds train/ and test/")
    options = parser.parse_args()
    network, = ROOT.glob(f"docs/runs/*/{script.NETWORK_FILE}")
    model, emotions = script.load_network(network)
    data = script.load_data(options.data_dir)
    if emotions != data.emotions:
        sys.exit(f"error: the network knows {emotions}, the images show {data.emotions}")
    return model, data


def accuracy(probabilities, labels):
    """Return the share of correct answers among probabilities (n x classes), as a text."""
    return f"{100 * (probabilities.argmax(axis=1) == labels).mean():.1f} %"
