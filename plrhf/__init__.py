"""Personalised RLHF: user models learned together with reward models and policies."""
