# Flags for every target.
set(FLAGS -Wall)
