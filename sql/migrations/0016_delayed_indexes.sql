-- Each look at what was given back has one index that it can use. Statistics of an almost empty table make all indexes of it look
-- equally cheap, and the wrong one walks all that the consumer has for each message.
drop index delayed_key, delayed_visible_at;

-- By key: the consumer is in the hash, and leads no column. Statements say `consumer_id + 0 = ...`, which no other index serves.
create index delayed_key on delayed (hashtextextended(key, consumer_id)) where in_order;

-- By time: statements that say `visible_at > '-infinity'` find it. Others, which look for a seq, have the primary key alone.
create index delayed_visible_at on delayed (consumer_id, visible_at, seq) where visible_at > '-infinity';

-- A claim in order asks whether a barrier was given back. There is hardly ever one.
create index delayed_barrier on delayed (consumer_id) where barrier;
