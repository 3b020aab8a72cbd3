"""`make fuzz`: foreign bytes for every parser that meets some before a signature is checked, and for what unpacks.

* mutate: how a valid input becomes another;
* targets: each parser, its seeds, and the errors it may raise;
* play: one target, in a process of its own, for some seconds.
"""
