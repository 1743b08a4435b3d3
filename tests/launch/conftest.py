import pytest

from tests.launch import commands


@pytest.fixture(scope="package")
def golden_checkpoint(tmp_path_factory):
    return commands.convert_golden(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory):
    """Random weights of configs/tiny.py, and a tokenizer."""
    return commands.save_tiny(tmp_path_factory.mktemp("tiny") / "ckpt")
