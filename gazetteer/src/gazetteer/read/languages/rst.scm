; Headings
(section (title) @heading.adorned)

; Names set as code
[(literal) (interpreted_text)] @code

; The document's first paragraph introduces it
(document . (section) . (paragraph) @overview)
(document . (paragraph) @overview)

; Other files
((directive name: (type) @_t body: (body (arguments) @import.module))
  (#any-of? @_t "include" "literalinclude" "image" "figure"))
