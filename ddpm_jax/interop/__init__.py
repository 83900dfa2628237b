"""Other people's weights and settings, in and out."""
