-- Changes that the Debezium engine and cdcbridge both turn into events: tests/debezium/record.py.
create table plain (id int primary key, name text, n int)
create table whole (id int primary key, name text, body text)
alter table whole replica identity full
create table pair (a int, b text, v int, primary key (b, a))
create table types (id int primary key, flag boolean, small smallint, big bigint, single real, twice double precision, amount numeric(10,2), exact numeric, letters text, fixed char(5), varying varchar(9), bytes bytea, document json, binary_document jsonb, day date, hour time, hour_zone timetz, moment timestamp, moment_zone timestamptz, span interval, identity uuid, address inet, network cidr, hardware macaddr, bits bit(3), one_bit bit, word tsvector, place point, range int4range, numbers int[], words text[], cash money)
create table large (id int primary key, n int, body text)
alter table large alter column body set storage external
create publication debezium for table plain, whole, pair, types, large
-- changes
insert into plain values (1, 'Ada "x" ü', 10), (2, null, null)
update plain set n = 11 where id = 1
delete from plain where id = 2
update plain set id = 3 where id = 1
insert into whole values (1, 'a', 'b')
update whole set name = 'c'
delete from whole
insert into pair values (1, 'k', 5)
update pair set v = 6
delete from pair
insert into types values (1, true, 2, 9007199254740993, 1.5, 2.25, 12.50, 1234.5678, 'text', 'ab', 'vary', '\x00ff', '{"a": [1, 2]}', '{"b": null}', '2026-05-01', '10:20:30.123456', '10:20:30+02', '2026-05-01 10:20:30.123456', '2026-05-01 10:20:30.123456+02', '1 day 02:03:04', '3f2504e0-4f89-11d3-9a0c-0305e82c3301', '192.168.0.1', '192.168.0.0/24', '08:00:2b:01:02:03', B'101', B'1', 'word', '(1,2)', '[1,5)', '{1,2}', '{a,NULL}', '12.30')
insert into types (id) values (2)
insert into large select 1, 1, string_agg(md5(n::text), '') from generate_series(1, 200) n
update large set n = 2
truncate plain
begin
insert into plain values (7, 'two', 1)
insert into plain values (8, 'rows', 2)
commit
select pg_logical_emit_message(true, 'invoices', '{"a": 1}')
select pg_logical_emit_message(true, 'cdcbridge:invoices', '{"data": {"a": 1}}')
