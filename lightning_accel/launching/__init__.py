"""Starting the ranks of a script on one machine or several: what ``accel launch`` does, without its command line."""
