package tensordb

import (
	"fmt"
	"strings"
	"testing"
)

// wire writes a command as bytes.
func wire(words ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(words))
	for _, w := range words {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(w), w)
	}
	return b.String()
}

// exchange answers commands of an open server and returns the bytes.
func exchange(t *testing.T, commands ...string) string {
	t.Helper()
	_, socket := startServer(t, Config{}, ServerConfig{Open: true, MaxBulk: 1 << 30})
	got := answers(t, socket, strings.Join(commands, "")+wire("QUIT"))
	reply, ok := strings.CutSuffix(got, "+OK\r\n")
	if !ok {
		t.Fatalf("%q does not end with the answer to QUIT", got)
	}
	return reply
}

// Replies as RedisAI's, to the byte.
func TestRedisAIReplies(t *testing.T) {
	meta := func(name, dims string, n int) string {
		return fmt.Sprintf("*%d\r\n$5\r\ndtype\r\n$%d\r\n%s\r\n$5\r\nshape\r\n%s", n, len(name), name, dims)
	}
	set := func(words ...string) string { return wire(append([]string{"AI.TENSORSET"}, words...)...) }
	get := func(words ...string) string { return wire(append([]string{"AI.TENSORGET"}, words...)...) }
	ok := "+OK\r\n"
	for _, c := range []struct{ send, want string }{
		{set("k", "int32", "2", "2", "values", "1", "2", "3", "4") + get("k"), ok + meta("INT32", "*2\r\n:2\r\n:2\r\n", 6) + "$4\r\nblob\r\n$16\r\n\x01\x00\x00\x00\x02\x00\x00\x00\x03\x00\x00\x00\x04\x00\x00\x00\r\n"},
		{set("k", "DOUBLE", "2", "1", "VALUES", "1.5", "-2.25") + get("k", "VALUES", "META"), ok + meta("DOUBLE", "*2\r\n:2\r\n:1\r\n", 6) + "$6\r\nvalues\r\n*2\r\n$3\r\n1.5\r\n$5\r\n-2.25\r\n"},
		{set("k", "FLOAT", "2") + get("k", "META"), ok + meta("FLOAT", "*1\r\n:2\r\n", 4)},
		{set("k", "FLOAT", "2", "VALUES", "0.1", "inf") + get("k", "VALUES"), ok + "*2\r\n$19\r\n0.10000000149011612\r\n$3\r\ninf\r\n"},
		{set("k", "FLOAT", "3", "VALUES", "0x10", "1e39", "-0") + get("k", "VALUES"), ok + "*3\r\n$2\r\n16\r\n$3\r\ninf\r\n$2\r\n-0\r\n"},
		{wire("HELLO", "3") + set("k", "DOUBLE", "1", "VALUES", "0.1") + get("k", "VALUES"), "%7\r\n"},
		{set("k", "INT8", "2", "BLOB", "\xff\x05") + get("k", "VALUES"), ok + "*2\r\n:-1\r\n:5\r\n"},
		{set("k", "UINT16", "BLOB", "\xff\xff") + get("k", "META", "VALUES"), ok + meta("UINT16", "*0\r\n", 6) + "$6\r\nvalues\r\n*1\r\n:65535\r\n"},
		{set("k", "INT8", "4", "BLOB", "BLOB") + get("k", "BLOB"), ok + "$4\r\nBLOB\r\n"},
		{set("k", "BOOL", "2", "VALUES", "0", "1") + get("k", "VALUES"), ok + "*2\r\n:0\r\n:1\r\n"},

		{wire("Ai.TensorSet", "k", "FLOAT"), "-ERR wrong number of arguments for 'Ai.TensorSet' command\r\n"},
		{get("k", "META", "BLOB", "META"), "-ERR wrong number of arguments for 'AI.TENSORGET' command\r\n"},
		{get("k", "NOTHING"), "-ERR tensor key is empty or in a different shard\r\n"},
		{set("k", "FLOAT", "1") + get("k", "NOTHING"), ok + "-ERR unsupported data format\r\n"},
		{set("k", "FLOAT", "1") + get("k", "BLOB", "VALUES"), ok + "-ERR both BLOB and VALUES specified\r\n"},
		{set("k", "FP32", "0"), "-ERR invalid data type\r\n"},
		{set("k", "STRING", "1"), "-ERR invalid data type\r\n"},
		{set("k", "FLOAT", "0"), "-ERR invalid or negative value found in tensor shape\r\n"},
		{set("k", "FLOAT", "-1", "BLOB", "x"), "-ERR invalid or negative value found in tensor shape\r\n"},
		{set("k", "FLOAT", "+2", "VALUES", "1", "1"), "-ERR invalid or negative value found in tensor shape\r\n"},
		{set("k", "FLOAT", "4294967296", "4294967296"), "-ERR invalid or negative value found in tensor shape\r\n"},
		{set("k", "FLOAT", "1099511627776"), "-ERR invalid or negative value found in tensor shape\r\n"},
		{set("k", "FLOAT", "1", "BLOB", "abcd", "x"), "-ERR a single binary string should come after the BLOB argument in 'AI.TENSORSET' command\r\n"},
		{set("k", "FLOAT", "1", "BLOB"), "-ERR a single binary string should come after the BLOB argument in 'AI.TENSORSET' command\r\n"},
		{set("k", "FLOAT", "1", "BLOB", "abc"), "-ERR data length does not match tensor shape and type\r\n"},
		{set("k", "BOOL", "2", "BLOB", "\x00\x02"), "-ERR BOOL tensor elements must be 0 or 1\r\n"},
		{set("k", "FLOAT", "2", "VALUES", "1"), "-ERR wrong number of values was given in 'AI.TENSORSET' command\r\n"},
		{set("k", "FLOAT", "2", "VALUES"), "-ERR wrong number of values was given in 'AI.TENSORSET' command\r\n"},
		{set("k", "FLOAT", "1", "VALUES", "nan"), "-ERR invalid value\r\n"},
		{set("k", "DOUBLE", "1", "VALUES", "1e-400"), "-ERR invalid value\r\n"},
		{set("k", "DOUBLE", "1", "VALUES", "1_0"), "-ERR invalid value\r\n"},
		{set("k", "DOUBLE", "1", "VALUES", "0xep-2000"), "-ERR invalid value\r\n"},
		{set("k", "INT8", "1", "VALUES", strings.Repeat("1", maxArg+1)), "-ERR invalid value\r\n"},
		{set("k", "INT8", "1", "VALUES", "-1"), "-ERR invalid value\r\n"},
		{set("k", "INT8", "1", "VALUES", "128"), "-ERR invalid value\r\n"},
		{set("k", "INT8", "1", "VALUES", "01"), "-ERR invalid value\r\n"},
		// What is refused changes nothing.
		{set("k", "INT8", "1", "VALUES", "7") + set("k", "INT8", "1", "VALUES", "x") + get("k", "VALUES"), ok + "-ERR invalid value\r\n*1\r\n:7\r\n"},
		// Types that RedisAI does not have.
		{wire("TENSOR.SET", "k", "float16", "1", "1", "ab") + get("k"), ":"},
	} {
		if got := exchange(t, c.send); !strings.HasPrefix(got, c.want) || len(c.want) > 5 && got != c.want {
			t.Errorf("%.200q:\n got  %.300q\n want %.300q", c.send, got, c.want)
		}
	}
	if got := exchange(t, wire("HELLO", "3"), set("k", "DOUBLE", "1", "VALUES", "0.1"), get("k", "VALUES")); !strings.HasSuffix(got, "*1\r\n,0.10000000000000001\r\n") {
		t.Errorf("in RESP3: %q", got)
	}
}

// A large shape alone takes no memory: its blob is not there.
func TestRedisAIShapeTakesNothing(t *testing.T) {
	db := open(t, Config{MaxMemory: 1 << 20})
	_, set := FindCommand([]byte("AI.TENSORSET"))
	for _, dims := range []string{"1000000", "100000000", "9223372036854775807"} {
		args := [][]byte{[]byte("k"), []byte("FLOAT"), []byte(dims), []byte("BLOB")}
		err := set.Run(&Call{DB: db, Args: args, Payload: word("abcd"), Reply: &conn{version: 2}})
		if err == nil || strings.Contains(err.Error(), "OOM") {
			t.Errorf("%s: %v", dims, err)
		}
	}
	if s := db.Stats(); s.Keys != 0 || s.MemoryUsed+s.MemoryFree != 0 {
		t.Errorf("%+v", s)
	}
}

// FuzzAITensor sends AI.TENSORSET with any words; nothing may fail badly, and
// what is stored can be read.
func FuzzAITensor(f *testing.F) {
	f.Add("FLOAT", "2", "VALUES", "1", "2")
	f.Add("int8", "2", "BLOB", "ab", "")
	f.Add("BOOL", "BLOB", "\x01", "9999999999", "")
	f.Fuzz(func(t *testing.T, a, b, c, d, e string) {
		db := open(t, Config{MaxMemory: 1 << 20})
		words := [][]byte{[]byte("k")}
		for _, w := range []string{a, b, c, d, e} {
			if w != "" && len(w) <= maxArg {
				words = append(words, []byte(w))
			}
		}
		if len(words) < 3 {
			return
		}
		_, set := FindCommand([]byte("AI.TENSORSET"))
		_, get := FindCommand([]byte("AI.TENSORGET"))
		r := &conn{version: 2}
		err := set.Run(&Call{DB: db, Args: words[:len(words)-1], Payload: word(words[len(words)-1]), Reply: r})
		if err == nil {
			if err := get.Run(&Call{DB: db, Args: [][]byte{[]byte("k"), []byte("META"), []byte("VALUES")}, Reply: r}); err != nil {
				t.Fatal(err)
			}
		} else if db.Exists("k") {
			t.Fatalf("%q was refused (%v) and stored", words, err)
		}
	})
}

// word is a payload that is a word.
type word []byte

func (w word) Size() (int, error) { return len(w), nil }

func (w word) Read(dst []byte, check func(part []byte, offset int)) error {
	copy(dst, w)
	return nil
}
