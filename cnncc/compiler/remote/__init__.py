"""Engines on a board in the lab, through TVM's RPC: to prove and to measure them there, never to publish them.

RPC has neither encryption nor a password, and whoever reaches a server runs code on it. So only this machine's own
loopback is spoken to, and a tunnel makes the board's port one of it.
"""
