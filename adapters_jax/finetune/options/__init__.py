"""The flags of the commands, as frozen dataclasses that commands share."""
