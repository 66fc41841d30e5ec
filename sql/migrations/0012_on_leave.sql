-- Consumers with on_leave: delete get data of their own for some messages; redriven keeps it until they are finished.
-- The function has two arguments more now.
drop function if exists replay_messages(int, bigint[], text[]);

-- Patterns for LIKE: of names in part, such as sales.o_*, and of tables that are left out. Null: there are none.
alter type stream_wish add attribute taken text[], add attribute left_out text[];
