"""G6: (data -> 'record')::jsonb equals to_jsonb(row), for every type and its ugly values, under hostile settings."""

from __future__ import annotations

from tests.harness.world import World

HOSTILE = (
    "alter database {} set datestyle = 'German, DMY'",
    "alter database {} set timezone = 'Asia/Kathmandu'",
    "alter database {} set intervalstyle = 'sql_standard'",
    "alter database {} set bytea_output = 'escape'",
    "alter database {} set extra_float_digits = -10",
)
Cases = tuple[tuple[str, tuple[str, ...]], ...]
TYPES = (
    'create schema "We ird"',
    """create type "We ird"."En ""um" as enum ('a', 'with space', 'quo"te', 'apo''strophe', 'comma,', '{brace}', 'NULL')""",
    "create domain d_int as int",
    "create domain d_numeric as numeric(20, 4)",
    "create domain d_bytea as bytea",
    "create domain d_stamp as timestamptz",
    "create domain d_json as json",
    "create domain d_bool as bool",
    "create domain d_array as int[]",
    "create domain d_d as d_numeric",
    """create domain "We ird"."Dom" as "We ird"."En ""um" """,
    "create type my_range as range (subtype = float8)",
    "create type pair as (a int, b text)",
)
# (column type, values as SQL expressions)
CASES: Cases = (
    ("bool", ("true", "false", "null")),
    ("int2", ("-32768", "32767")),
    ("int4", ("-2147483648", "2147483647")),
    ("int8", ("-9223372036854775808", "9223372036854775807")),
    ("float4", ("0.1", "3.4028235e38", "1e-45", "-0", "16777217")),
    ("float8", ("0.1", "1.7976931348623157e308", "5e-324", "1e22", "123456789012345680", "-0")),
    ("numeric", ("0", "1.50", "1e-20", f"{'9' * 60}.{'8' * 40}", "-0.000000000000000000000000000001", "1e100")),
    ("numeric(12, 2)", ("12.50", "0.00")),
    ("money", ("'-12.34'",)),
    (
        "text",
        (
            "''",
            "'quo\"te \\ back / slash'",
            r"E'\n\r\t\b\f\x01\x1f\x7f'",
            "'ünïcödé 漢字 🐘'",
            '\'{"typeoid":1700,"value":12.5}\'',
        ),
    ),
    ("varchar(20)", ("'x'",)),
    ("char(5)", ("'ab'",)),
    ('"char"', ("'a'",)),
    ("name", ("'a name'",)),
    ("bytea", (r"'\x'", r"'\x00ff7f5c27'", r"'\xdeadbeef'")),
    ("uuid", ("'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'",)),
    ("date", ("'2024-02-29'", "'infinity'", "'-infinity'", "'0044-03-15 BC'", "'20000-01-01'")),
    ("time", ("'23:59:59.999999'", "'24:00'")),
    ("timetz", ("'12:00:00.5+05:45'",)),
    (
        "timestamp",
        ("'2024-02-29 12:34:56.789'", "'infinity'", "'-infinity'", "'0044-03-15 01:02:03 BC'", "'99999-12-31'"),
    ),
    (
        "timestamptz",
        (
            "'2024-02-29 12:34:56.789+01'",
            "'infinity'",
            "'-infinity'",
            "'0044-03-15 01:02:03+00 BC'",
            "'1900-01-01 00:00:00+00'",
        ),
    ),
    ("interval", ("'1 year 2 mons -3 days 04:05:06.789'", "'-1 day'", "'0'")),
    (
        "json",
        (
            """'{"a": 1, "a": 2, "big": 123456789012345678901234567890.5, "e": 1e400, "s": "\\u00e9\\n"}'""",
            "'null'",
            "'[1, {}]'",
            "'\"x\"'",
        ),
    ),
    ("jsonb", ("""'{"b": [1, 2.50, null], "a": {"x": "y"}}'""", "'null'", "'1.10'")),
    ("inet", ("'10.0.0.1/8'",)),
    ("cidr", ("'10.0.0.0/8'",)),
    ("macaddr", ("'08:00:2b:01:02:03'",)),
    ("macaddr8", ("'08:00:2b:01:02:03:04:05'",)),
    ("bit(3)", ("B'101'",)),
    ("varbit", ("B''", "B'1'")),
    ("point", ("'(1,2.5)'",)),
    ("line", ("'{1,2,3}'",)),
    ("lseg", ("'[(0,0),(1,1)]'",)),
    ("box", ("'((0,0),(1,1))'",)),
    ("path", ("'((0,0),(1,1))'",)),
    ("polygon", ("'((0,0),(1,1),(2,0))'",)),
    ("circle", ("'<(0,0),1>'",)),
    ("tsvector", ("'a fat cat'",)),
    ("tsquery", ("'fat & cat'",)),
    ("oid", ("0", "4294967295")),
    ("xid", ("'4294967295'",)),
    ("xid8", ("'18446744073709551615'",)),
    ("cid", ("'1'",)),
    ("tid", ("'(1,2)'",)),
    ("pg_lsn", ("'16/B374D848'",)),
    ("regclass", ("'pg_class'",)),
    ("regtype", ("'int'",)),
    ("int2vector", ("'1 2 3'",)),
    ("oidvector", ("'1 2 3'",)),
    ("jsonpath", ("'$.a'",)),
    ("txid_snapshot", ("'10:20:10,14'",)),
    ("int4range", ("'[1,10)'", "'empty'", "'(,5]'")),
    ("numrange", ("'[1.5,2.50]'",)),
    ("tsrange", ("'[2024-01-01, 2024-01-02)'",)),
    ("tstzrange", ("'[2024-01-01 00:00+00,)'",)),
    ("daterange", ("'[2024-01-01,2024-02-01)'",)),
    ("int4multirange", ("'{[1,3),[5,7)}'",)),
    ("my_range", ("'[1.5,2.5]'",)),
    ("int4[]", ("'{}'", "'{1,NULL,3}'", "'{{1,2},{3,4}}'", "'[0:1]={7,8}'", "'[2:3][0:1]={{1,2},{3,4}}'")),
    ("text[]", ("""array['a', null, 'NULL', '', 'quo"te', 'back\\slash', 'com,ma', '{br}', E'new\\nline', 'ü']""",)),
    ("numeric[]", ("'{1.50,NaN,NULL,1e30}'",)),
    ("float8[]", ("'{0.1,NaN,Infinity,-Infinity}'",)),
    ("bool[]", ("'{t,f,NULL}'",)),
    ("bytea[]", (r"array['\x00ff'::bytea, '\x'::bytea, null]",)),
    ("date[]", ("'{2024-02-29,infinity}'",)),
    ("timestamp[]", ("array['2024-02-29 12:00'::timestamp, null]",)),
    ("timestamptz[]", ("array['2024-02-29 12:00+00'::timestamptz, 'infinity']",)),
    ("interval[]", ("array['1 day 02:03'::interval]",)),
    ("json[]", ("""array['{"a": 1, "a": 2}'::json, null, '"x,y"'::json]""",)),
    ("jsonb[]", ("""array['{"a": [1, 2]}'::jsonb]""",)),
    ("box[]", ("array['((0,0),(1,1))'::box, '((2,2),(3,3))'::box]",)),
    ("point[]", ("array['(1,2)'::point]",)),
    ("int4range[]", ("array['[1,10)'::int4range, 'empty']",)),
    ("uuid[]", ("array['a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid]",)),
    ("oid[]", ("array[1::oid]",)),
    ('"We ird"."En ""um"', ("'with space'", "'quo\"te'", "'NULL'", "'{brace}'")),
    ('"We ird"."En ""um"[]', ("""array['with space', 'quo"te', 'comma,', 'NULL', null]::"We ird"."En ""um"[]""",)),
    ('"We ird"."Dom"', ("'comma,'",)),
    ("d_int", ("42",)),
    ("d_numeric", ("1.5", "-99999999999.1234")),
    ("d_d", ("2.5",)),
    ("d_bytea", (r"'\x00ff'",)),
    ("d_stamp", ("'2024-02-29 12:00+00'",)),
    ("d_json", ("""'{"a": 1}'""",)),
    ("d_bool", ("true", "false")),
    ("d_array", ("'{1,2,NULL}'",)),
    ("d_int[]", ("'{1,2}'",)),
)
XML = (("xml", ("'<a>1</a>'",)),)  # Debian's server alone is built with libxml
# A wal2json without numeric-data-types-as-string sends these as null outside arrays: the documented exception.
SPECIAL: Cases = (
    ("float4", ("'NaN'", "'Infinity'", "'-Infinity'")),
    ("float8", ("'NaN'", "'Infinity'", "'-Infinity'")),
    ("numeric", ("'NaN'", "'Infinity'", "'-Infinity'")),
)
SESSION = (
    "set timezone = 'UTC'",
    "set datestyle = 'ISO'",
    "set intervalstyle = 'postgres'",
    "set bytea_output = 'hex'",
    "set extra_float_digits = 1",
)


def create_types(world: World, cases: Cases) -> int:
    """One table with a column per case; a row per value. Returns how many rows."""
    world.execute(*TYPES)
    columns = ", ".join(f"c{n} {kind}" for n, (kind, _) in enumerate(cases))
    world.execute(f"create table public.t (id serial primary key, {columns})")
    world.consumer()
    return sum(len(values) for _, values in cases)


def insert_cases(world: World, cases: Cases) -> None:
    for number, (kind, values) in enumerate(cases):
        for value in values:
            world.execute(f"insert into public.t (c{number}) values (({value})::{kind})")


def differences(world: World, cases: Cases) -> list[str]:
    world.leave()
    world.execute(*SESSION)
    rows = world.sql.execute(
        "select t.id, e.key, e.value, r.value from public.t"
        " join cdcbridge.messages m on m.key = t.id::text and m.data ->> 'op' = 'insert'"
        " cross join lateral jsonb_each(to_jsonb(t)) e"
        " left join lateral jsonb_each((m.data -> 'record')::jsonb) r on r.key = e.key"
        " where r.value is distinct from e.value"
    ).fetchall()
    return [f"{cases[int(key[1:])][0]}: to_jsonb {want!r}, record {have!r}" for _, key, want, have in rows]


def test_record_equals_to_jsonb_for_every_type_under_hostile_settings(world: World) -> None:
    cases = CASES if world.plugin == "wal2json" else CASES + SPECIAL
    if world.sql.info.server_version < 180000:
        cases += XML
    for statement in HOSTILE:
        world.execute(statement.format(world.database))
    world.leave()
    count = create_types(world, cases)
    with world.bridge():
        insert_cases(world, cases)
        world.messages(count)
    assert differences(world, cases) == []
    assert (
        world.rows("select t.id from public.t left join cdcbridge.messages m on m.key = t.id::text where m.seq is null")
        == []
    )


def test_an_old_wal2json_sends_special_numbers_as_null_and_check_names_the_columns(world15: World) -> None:
    count = create_types(world15, SPECIAL)
    with world15.bridge():
        insert_cases(world15, SPECIAL)
        records = [data["record"] for data in world15.data(count)]
    assert all(value is None for record in records for name, value in record.items() if name != "id")
    problems = world15.json("check", "--json")["problems"]
    named = [p for p in problems if p["code"] == "wal2json_special_numbers"]
    assert named and all(f"c{n}" in named[0]["message"] for n in range(len(SPECIAL)))
