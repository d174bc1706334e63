"""fdk inside other libraries, each module for one of them, imported only where that one is."""
