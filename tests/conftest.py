"""Processes that tests start see no GPU: a machine with one would give two ranks the same, or none. And
vocabularies are trained on little text."""

import os

import torch

from data import prepare

prepare.VOCABULARY_CHARACTERS = 200_000

WERE = "OCTO_VISIBLE_DEVICES"  # what pytest -n was started with: its workers are to see that
if "PYTEST_XDIST_WORKER" in os.environ and WERE in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[WERE]
    if os.environ[WERE] == "all":
        del os.environ["CUDA_VISIBLE_DEVICES"]
os.environ.setdefault(WERE, os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
if torch.cuda.is_available():
    torch.cuda.init()  # this process keeps what it sees
    torch.cuda.device_count()  # torch before 2.13 would count again, and find none
os.environ["CUDA_VISIBLE_DEVICES"] = ""
