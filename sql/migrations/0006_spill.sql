-- Transactions that the source sends while they are in progress: put aside until they commit, seen by no consumer. Unlogged: when
-- anything dies, the source sends them again from their beginning.
-- block: messages of the output plugin, each with its length and its subtransaction; n counts a transaction's blocks from 0.
create unlogged table spilled (
    xid   bigint not null,
    n     int    not null,
    block bytea  not null,
    primary key (xid, n)
);
alter table spilled alter column block set storage external; -- compression would cost more than it saves

-- It has a second parameter now; two of one name would be ambiguous.
drop function if exists take_lead(text);
