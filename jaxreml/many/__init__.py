"""The engines that fit one model to many responses."""
