"""Processes that tests start see no GPU: a machine with one would give two ranks the same, or none."""

import os

import torch

if torch.cuda.is_available():
    torch.cuda.init()  # this process keeps what it sees
os.environ["CUDA_VISIBLE_DEVICES"] = ""
