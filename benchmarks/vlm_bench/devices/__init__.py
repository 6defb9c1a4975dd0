"""Measuring on another machine: `remote.measure_on` is the way in; ssh:// and adb:// addresses (`address`).

Nothing is imported here: `agent` runs on the device with the standard library alone.
"""
