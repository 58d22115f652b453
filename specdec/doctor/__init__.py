"""What is wrong with a set-up: facts about this machine, and checks of them that read nothing themselves."""
