"""The static site: Hugo renders the Markdown pages, Pagefind indexes their words, ``serve`` shows them."""
