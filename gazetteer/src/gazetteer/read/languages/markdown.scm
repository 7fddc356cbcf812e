; Headings
(atx_heading (atx_h1_marker) heading_content: (_) @heading.1)
(atx_heading (atx_h2_marker) heading_content: (_) @heading.2)
(atx_heading (atx_h3_marker) heading_content: (_) @heading.3)
(atx_heading (atx_h4_marker) heading_content: (_) @heading.4)
(atx_heading (atx_h5_marker) heading_content: (_) @heading.5)
(atx_heading (atx_h6_marker) heading_content: (_) @heading.6)
(setext_heading heading_content: (_) @heading.1 (setext_h1_underline))
(setext_heading heading_content: (_) @heading.2 (setext_h2_underline))

; The document's first paragraph introduces it
(document . (section . (atx_heading) . (paragraph) @overview))
(document . (section . (setext_heading) . (paragraph) @overview))
(document . (section . (paragraph) @overview))

; Text that the inline grammar reads
(inline) @inline

; Links to other files
(link_reference_definition (link_destination) @import.module)
