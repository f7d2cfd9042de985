"""Recipes: from data to a trained, measured, explained adapter. ``peft.finetune(recipe)`` and the command line are the ways in."""
