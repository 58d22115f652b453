"""The drafters. One folder per family; `families` names them."""
