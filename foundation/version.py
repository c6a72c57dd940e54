"""The version of this code, as plans and the command line say it.

A constant and not the installed package's metadata: code sent to a cluster is not installed there.
"""

VERSION = "0.1.0"
