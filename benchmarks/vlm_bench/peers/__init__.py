"""Peers: other toolkits on the same weights. A package each, named as after --peer with _ for -.

`__init__.py` is our side: `PRECISIONS` (the first is the usual one), `PACKAGES` (what its environment must be able to
import), `INSTALL` (what to do where it is not), and `contestant(job)`, which converts the checkpoint and says how to
start the peer. Files beside it run in the peer's own environment and import nothing of ours.
"""
