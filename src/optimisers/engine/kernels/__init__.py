"""From a program to something that runs over a table of addresses, for each kind of device."""
