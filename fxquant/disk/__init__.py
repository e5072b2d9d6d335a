"""Files and folders: written completely or not at all, and read with errors that name the file."""
