"""Each claim's verdict, by what it is judged on."""
