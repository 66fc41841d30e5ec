-- Acks above READ COMMITTED take as long as others do. This version's code brings the function back, with one argument more.
drop function if exists settle_some(int, bigint[], bigint[], bigint[], timestamptz);
