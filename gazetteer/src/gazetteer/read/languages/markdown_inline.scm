(code_span) @code
(inline_link (link_destination) @import.module)
(image (link_destination) @import.module)
