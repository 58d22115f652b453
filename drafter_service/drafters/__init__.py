"""The drafters. One module per family; `registry` names them."""
