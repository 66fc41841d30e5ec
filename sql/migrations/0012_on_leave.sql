-- Consumers with on_leave: delete get data of their own for some messages; redriven keeps it until they are finished.
-- The function has two arguments more now.
drop function if exists replay_messages(int, bigint[], text[]);
