; Definitions: keys of the two outer levels
(stream (document (block_node (block_mapping (block_mapping_pair key: (_) @name) @constant.key))))
(stream (document (block_node (block_mapping (block_mapping_pair
  value: (block_node (block_mapping (block_mapping_pair key: (_) @name) @constant.key)))))))
(stream (document (flow_node (flow_mapping (flow_pair key: (_) @name) @constant.key))))

; Documentation
(comment) @comment

; Idioms
(anchor) @find.anchor
