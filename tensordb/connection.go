package tensordb

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spirt-ml/spirt/resp"
)

// This file has the commands that only a Server has: for another host, such as
// Redis, they are its own.

func connectionCommands() []*Command {
	list := []*Command{
		{
			Name: "AUTH", Args: "[user] token", Summary: "Shows a token. The user is not looked at. The fourth wrong token closes the connection.", Reply: "OK",
			Min: 2, Max: 3, stranger: true, serve: (*conn).auth,
		}, {
			Name: "HELLO", Args: "[2|3 [AUTH user token] [SETNAME name]]", Summary: "Chooses the version of the protocol, and shows a token.", Reply: "map: server, version, proto, id, mode, role, modules",
			Min: 1, Max: 7, stranger: true, serve: (*conn).hello,
		}, {
			Name: "GRANT", Args: "seconds minibatch accumulator key [key ...]",
			Summary: "Makes a token for one invocation of a function: it may read the keys, at most 8, and add this minibatch to this accumulator, no more; with minibatch -1 it may add nothing. Connections may show it for so many seconds.",
			Reply:   "the token", Min: 5, Max: 4 + maxGrantKeys, Access: All, FirstKey: 3, LastKey: -1, serve: (*conn).signGrant,
		}, {
			Name: "QUIT", Summary: "Closes the connection.", Reply: "OK", Min: 1, Max: 1, stranger: true, serve: (*conn).bye,
		}, {
			Name: "PING", Args: "[message]", Summary: "Answers.", Reply: "PONG, or the message", Min: 1, Max: 2, serve: (*conn).ping,
		}, {
			Name: "ECHO", Args: "message", Summary: "Answers with the message.", Reply: "the message", Min: 2, Max: 2, serve: (*conn).ping,
		}, {
			Name: "SELECT", Args: "0", Summary: "Does nothing: there is one database.", Reply: "OK", Min: 2, Max: 2, serve: (*conn).selectDB,
		}, {
			Name: "CLIENT", Args: "ID | GETNAME | SETNAME name | SETINFO LIB-NAME|LIB-VER text | INFO | LIST | KILL ID id | NO-EVICT ON|OFF | NO-TOUCH ON|OFF",
			Summary: "Tells of connections. LIST and KILL need a token that allows everything.", Reply: "by subcommand, as in Redis", Min: 2, Max: 4, serve: (*conn).client,
		}, {
			Name: "COMMAND", Args: "[COUNT | LIST | INFO [name ...] | DOCS [name ...]]", Summary: "Describes the commands.", Reply: "as in Redis",
			Min: 1, serve: (*conn).command_,
		}, {
			Name: "INFO", Args: "[section ...]", Summary: "Tells of connections, of what was refused, of memory, checkpoints and keys.", Reply: "text",
			Min: 1, serve: (*conn).info,
		}, {
			Name: "SAVE", Summary: "Writes a checkpoint of all parameters and answers when it is durable.", Reply: "OK",
			Min: 1, Max: 1, Access: All, serve: (*conn).save,
		}, {
			Name: "BGSAVE", Summary: "Begins to write a checkpoint of all parameters as they are now.", Reply: "text",
			Min: 1, Max: 2, Access: All, serve: (*conn).save,
		}, {
			Name: "LASTSAVE", Summary: "Tells when the last checkpoint was written.", Reply: "seconds since 1970, 0 for never",
			Min: 1, Max: 1, serve: (*conn).lastSave,
		},
	}
	for _, cmd := range list {
		cmd.Group, cmd.Complexity = groupConnection, cmp.Or(cmd.Complexity, "O(1)")
	}
	return list
}

func keyCommands() []*Command {
	list := []*Command{
		{
			Name: "EXISTS", Args: "key [key ...]", Summary: "Counts how many of the keys are tensors.", Reply: "the number",
			Min: 2, FirstKey: 1, LastKey: -1, serve: (*conn).exists,
		}, {
			Name: "TYPE", Args: "key", Summary: "Tells what a key is.", Reply: "tensor or none", Min: 2, Max: 2, FirstKey: 1, LastKey: 1, serve: (*conn).kind,
		}, {
			Name: "KEYS", Args: "prefix*", Summary: "Lists the tensors that start with a prefix, sorted; only those that the token may use.", Reply: "array of keys",
			Min: 2, Max: 2, Complexity: "O(number of keys)", serve: (*conn).keys,
		}, {
			Name: "SCAN", Args: "cursor [MATCH prefix*] [COUNT n]", Summary: "Lists them bit by bit: begin with cursor 0 and go on with the one that is answered, until it is 0. What is there all the while is listed.",
			Reply: "array: cursor, array of keys", Min: 2, Max: 6, Complexity: "O(number of keys)", serve: (*conn).scan,
		}, {
			Name: "DBSIZE", Summary: "Counts the tensors.", Reply: "the number", Min: 1, Max: 1, serve: (*conn).size,
		}, {
			Name: "DEL", Args: "key [key ...]", Summary: "Removes tensors and accumulators.", Reply: "how many there were",
			Min: 2, Access: All, FirstKey: 1, LastKey: -1, serve: (*conn).del,
		}, {
			Name: "UNLINK", Args: "key [key ...]", Summary: "Removes tensors and accumulators.", Reply: "how many there were",
			Min: 2, Access: All, FirstKey: 1, LastKey: -1, serve: (*conn).del,
		}, {
			Name: "RENAME", Args: "source destination", Summary: "Gives a tensor another name; what had that name is gone.", Reply: "OK",
			Min: 3, Max: 3, Access: All, FirstKey: 1, LastKey: 2, serve: (*conn).rename,
		},
	}
	for _, unit := range []struct {
		prefix, unit string
	}{{"", "seconds"}, {"P", "milliseconds"}} {
		list = append(list, &Command{
			Name: unit.prefix + "EXPIRE", Args: "key " + unit.unit, Summary: "Has a tensor removed after a time. A new version is kept again.", Reply: "1, or 0 if there is no tensor",
			Min: 3, Max: 3, Access: All, FirstKey: 1, LastKey: 1, serve: (*conn).expire,
		}, &Command{
			Name: unit.prefix + "TTL", Args: "key", Summary: "Tells after which time a tensor is removed.", Reply: unit.unit + "; -1 if it is kept, -2 if there is none",
			Min: 2, Max: 2, FirstKey: 1, LastKey: 1, serve: (*conn).ttl,
		})
	}
	list = append(list, &Command{
		Name: "PERSIST", Args: "key", Summary: "Keeps a tensor that was to be removed.", Reply: "1, or 0 if it was not",
		Min: 2, Max: 2, Access: All, FirstKey: 1, LastKey: 1, serve: (*conn).persist,
	})
	for _, cmd := range list {
		cmd.Group, cmd.Complexity = groupKeys, cmp.Or(cmd.Complexity, "O(number of arguments)")
	}
	return list
}

func (c *conn) ok() error {
	c.Simple("OK")
	return nil
}

// current is the command that is being answered.
func (c *conn) current() *Command { return c.last.Load() }

func (c *conn) usage() error { return refuse("ERR", "use %s", c.current().Usage()) }

func (c *conn) auth(args [][]byte) error {
	secret := args[len(args)-1]
	token, grant := c.server.authenticate(secret), (*signedGrant)(nil)
	if token == nil {
		grant = c.server.openGrant(string(secret))
	}
	if token == nil && grant == nil {
		c.authErrors++
		c.quit = c.authErrors >= maxAuthErrors
		c.server.count(func(t *ServerStats) { t.WrongTokens++ })
		c.server.config.Logger.Warn("the database refuses a wrong token", "remote", c.nc.RemoteAddr().String())
		return refuse("WRONGPASS", "no such token")
	}
	shown := sha256.Sum256(secret)
	if !c.server.hold(shown, c.shown) {
		return refuse("ERR", "too many connections with this token")
	}
	c.token, c.grant, c.shown = token, grant, shown
	c.welcome()
	return c.ok()
}

func (c *conn) signGrant(args [][]byte) error {
	seconds, err := number("seconds", args[0], 1, int(maxGrantLife/time.Second))
	if err != nil {
		return err
	}
	minibatch, err := number("minibatch", args[1], -1, maxMinibatches)
	if err != nil {
		return err
	}
	g := Grant{Life: time.Duration(seconds) * time.Second}
	if minibatch >= 0 {
		g.Accumulate, g.Minibatch = string(args[2]), minibatch
	}
	for _, key := range args[3:] {
		g.Read = append(g.Read, string(key))
	}
	token, err := c.server.Sign(g)
	if err != nil {
		return refuse("ERR", "%v", err)
	}
	c.Text(token)
	return nil
}

// maxGrantLife bounds the life of a token that GRANT makes.
const maxGrantLife = 30 * 24 * time.Hour

// welcome lets who has shown a token send more.
func (c *conn) welcome() {
	c.r.SetLimits(resp.Limits{MaxArgs: maxArgs, MaxBulk: c.server.config.MaxBulk})
}

func (c *conn) hello(args [][]byte) error {
	version := c.version
	if len(args) > 0 {
		switch string(args[0]) {
		case "2":
			version = 2
		case "3":
			version = 3
		default:
			return refuse("NOPROTO", "unsupported protocol version: 2 and 3 are spoken here")
		}
		args = args[1:]
	}
	name := c.name
	for len(args) > 0 {
		switch word := strings.ToUpper(string(args[0])); {
		case word == "AUTH" && len(args) >= 3:
			at := len(c.out)
			if err := c.auth(args[2:3]); err != nil {
				return err
			}
			c.out = c.out[:at] // HELLO answers for both
			args = args[3:]
		case word == "SETNAME" && len(args) >= 2:
			if !printable(args[1]) {
				return refuse("ERR", "a name has no spaces, line ends or other special characters")
			}
			name, args = string(args[1]), args[2:]
		default:
			return c.usage()
		}
	}
	if !c.known() {
		return refuse("NOAUTH", "HELLO must be called with the token: HELLO 3 AUTH default token")
	}
	c.version, c.name = version, name
	c.Map(7)
	c.Text("server")
	c.Text("spirt")
	c.Text("version")
	c.Text(cmp.Or(c.server.config.Version, "unknown"))
	c.Text("proto")
	c.Int(int64(c.version))
	c.Text("id")
	c.Int(c.id)
	c.Text("mode")
	c.Text("standalone")
	c.Text("role")
	c.Text("master")
	c.Text("modules")
	c.Array(0)
	return nil
}

// printable reports whether a name may stand in CLIENT LIST.
func printable(name []byte) bool {
	return !slices.ContainsFunc(name, func(b byte) bool { return b < '!' || b > '~' })
}

func (c *conn) bye([][]byte) error {
	c.quit = true
	return c.ok()
}

func (c *conn) ping(args [][]byte) error {
	if len(args) == 1 {
		c.Bulk(args[0])
	} else {
		c.Simple("PONG")
	}
	return nil
}

func (c *conn) selectDB(args [][]byte) error {
	if string(args[0]) != "0" {
		return refuse("ERR", "DB index is out of range: there is only database 0")
	}
	return c.ok()
}

func (c *conn) client(args [][]byte) error {
	sub, args := strings.ToUpper(string(args[0])), args[1:]
	switch {
	case sub == "ID" && len(args) == 0:
		c.Int(c.id)
	case sub == "GETNAME" && len(args) == 0:
		if c.name == "" {
			c.Nil()
		} else {
			c.Text(c.name)
		}
	case sub == "SETNAME" && len(args) == 1:
		if !printable(args[0]) {
			return refuse("ERR", "Client names cannot contain spaces, newlines or special characters.")
		}
		c.server.count(func(*ServerStats) { c.name = string(args[0]) })
		return c.ok()
	case sub == "SETINFO" && len(args) == 2:
		return c.ok() // that a client may tell is enough
	case (sub == "NO-EVICT" || sub == "NO-TOUCH") && len(args) == 1:
		return c.ok()
	case sub == "INFO" && len(args) == 0:
		c.Text(c.describe() + "\n")
	case sub == "LIST" || sub == "KILL":
		if c.token == nil || c.token.Access < All || c.token.Prefix != "" {
			return refuse("NOPERM", "this token may not use CLIENT %s", sub)
		}
		return c.clients(sub, args)
	default:
		return c.usage()
	}
	return nil
}

// describe returns what CLIENT LIST tells of a connection.
func (c *conn) describe() string {
	last := "NULL"
	if cmd := c.current(); cmd != nil {
		last = strings.ToLower(cmd.Name)
	}
	remote := c.nc.RemoteAddr().String()
	return fmt.Sprintf("id=%d addr=%s laddr=%s name=%s age=%d cmd=%s resp=%d", c.id, cmp.Or(remote, "unix"), c.nc.LocalAddr(), c.name, int(time.Since(c.opened).Seconds()), last, c.version)
}

func (c *conn) clients(sub string, args [][]byte) error {
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	if sub == "LIST" {
		var lines []string
		for _, other := range c.server.conns {
			if other != nil {
				lines = append(lines, other.describe()+"\n")
			}
		}
		slices.Sort(lines)
		c.Text(strings.Join(lines, ""))
		return nil
	}
	if len(args) != 2 || !strings.EqualFold(string(args[0]), "ID") {
		return c.usage()
	}
	id, err := number("id", args[1], 0, 1<<31-1)
	if err != nil {
		return err
	}
	killed := 0
	for nc, other := range c.server.conns {
		if other != nil && other.id == int64(id) {
			nc.Close()
			killed++
		}
	}
	c.Int(int64(killed))
	return nil
}

func (c *conn) command_(args [][]byte) error {
	sub := ""
	if len(args) > 0 {
		sub, args = strings.ToUpper(string(args[0])), args[1:]
	}
	chosen := func() []*Command {
		if len(args) == 0 {
			return commandTable()
		}
		var found []*Command
		for _, name := range args {
			_, cmd := FindCommand(name)
			found = append(found, cmd) // nil: none
		}
		return found
	}
	switch {
	case sub == "COUNT" && len(args) == 0:
		c.Int(int64(len(commandTable())))
	case sub == "LIST" && len(args) == 0:
		c.Array(len(commandTable()))
		for _, cmd := range commandTable() {
			c.Text(strings.ToLower(cmd.Name))
		}
	case sub == "" || sub == "INFO":
		list := chosen()
		c.Array(len(list))
		for _, cmd := range list {
			c.commandInfo(cmd)
		}
	case sub == "DOCS":
		list := slices.DeleteFunc(slices.Clone(chosen()), func(cmd *Command) bool { return cmd == nil })
		c.Map(len(list))
		for _, cmd := range list {
			c.Text(strings.ToLower(cmd.Name))
			c.Map(5)
			for _, text := range []string{"summary", cmd.Summary, "since", "1.0.0", "group", cmd.Group, "complexity", cmd.Complexity, "usage", cmd.Usage()} {
				c.Text(text)
			}
		}
	default:
		return c.usage()
	}
	return nil
}

// commandInfo answers as COMMAND INFO does for one command.
func (c *conn) commandInfo(cmd *Command) {
	if cmd == nil {
		c.Nil()
		return
	}
	arity := -cmd.Min
	if cmd.Max == cmd.Min {
		arity = cmd.Min
	}
	c.Array(10)
	c.Text(strings.ToLower(cmd.Name))
	c.Int(int64(arity))
	c.Array(1)
	if cmd.Access == ReadOnly {
		c.Simple("readonly")
	} else {
		c.Simple("write")
	}
	c.Int(int64(cmd.FirstKey))
	c.Int(int64(cmd.LastKey))
	step := 0
	if cmd.FirstKey > 0 {
		step = max(cmd.KeyStep, 1)
	}
	c.Int(int64(step))
	for range 4 { // categories, tips, key specifications, subcommands
		c.Array(0)
	}
}

func (c *conn) info([][]byte) error {
	stats, server := c.db.Stats(), c.server.Stats()
	saved, failed, changes := c.server.saver.state()
	c.Text(fmt.Sprintf("# Server\r\nserver:spirt\r\nspirt_version:%s\r\nuptime_in_seconds:%d\r\n"+
		"# Clients\r\nconnected_clients:%d\r\nrejected_connections:%d\r\nwrong_tokens:%d\r\nnot_allowed:%d\r\nmalformed:%d\r\ntimed_out:%d\r\n"+
		"# Memory\r\nused_memory:%d\r\nfree_memory:%d\r\nmaxmemory:%d\r\n"+
		"# Persistence\r\nlast_save_time:%d\r\nsave_in_progress:%d\r\nlast_save_status:%s\r\n"+
		"# Keyspace\r\ntensors:%d\r\naccumulators:%d\r\nversion_counter:%d\r\n",
		cmp.Or(c.server.config.Version, "unknown"), int(time.Since(c.server.made).Seconds()),
		server.Connections, server.TooMany, server.WrongTokens, server.NotAllowed, server.Malformed, server.TimedOut,
		stats.MemoryUsed, stats.MemoryFree, stats.MemoryLimit,
		saved, changes, failed,
		stats.Keys, stats.Accumulators, stats.LastVersion))
	return nil
}

// saver is what a server knows of its checkpoints.
type saver struct {
	mu      sync.Mutex
	running bool
	last    time.Time
	failed  error
	version uint64 // of the database at the last one
}

func (s *saver) state() (last int64, status string, running int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	status = "ok"
	if s.failed != nil {
		status = "err " + strings.Map(func(r rune) rune {
			if r < ' ' {
				return ' '
			}
			return r
		}, s.failed.Error())
	}
	if !s.last.IsZero() {
		last = s.last.Unix()
	}
	if s.running {
		running = 1
	}
	return last, status, running
}

// Save writes a checkpoint of all parameters, as ServerConfig.SaveAs, unless
// nothing has changed since the last one. What is a gradient is left out.
func (s *Server) Save() error {
	if s.config.SaveAs == "" {
		return refuse("ERR", "this database keeps no checkpoints: start it with a folder")
	}
	s.saver.mu.Lock()
	if s.saver.running {
		s.saver.mu.Unlock()
		return refuse("ERR", "Background save already in progress")
	}
	version := s.db.Stats().LastVersion
	if s.saver.failed == nil && version == s.saver.version && !s.saver.last.IsZero() {
		s.saver.mu.Unlock()
		return nil
	}
	s.saver.running = true
	s.saver.mu.Unlock()
	err := s.db.Save(s.config.SaveAs)
	s.saver.mu.Lock()
	defer s.saver.mu.Unlock()
	s.saver.running, s.saver.failed = false, err
	if err == nil {
		s.saver.last, s.saver.version = time.Now(), version
	} else {
		s.config.Logger.Error("a checkpoint could not be written", "error", err)
	}
	return err
}

func (c *conn) save([][]byte) error {
	if c.token == nil || c.token.Prefix != "" {
		return refuse("NOPERM", "this token may not use %s: it covers a part of the keys", c.current().Name)
	}
	if c.current().Name == "SAVE" {
		if err := c.server.Save(); err != nil {
			return asRefusal(err)
		}
		return c.ok()
	}
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	if _, _, running := c.server.saver.state(); running > 0 || c.server.closed {
		return refuse("ERR", "Background save already in progress")
	}
	c.server.wg.Add(1)
	go func() {
		defer c.server.wg.Done()
		c.server.Save() // tells the log and INFO
	}()
	c.Simple("Background saving started")
	return nil
}

// asRefusal makes any error a reply.
func asRefusal(err error) error {
	code := cmp.Or(errorCode(err), "ERR")
	return refuse(code, "%s", strings.TrimPrefix(err.Error(), code+" "))
}

func (c *conn) lastSave([][]byte) error {
	last, _, _ := c.server.saver.state()
	c.Int(last)
	return nil
}

func (c *conn) exists(args [][]byte) error {
	n := 0
	for _, key := range args {
		if c.db.Exists(string(key)) {
			n++
		}
	}
	c.Int(int64(n))
	return nil
}

func (c *conn) kind(args [][]byte) error {
	if c.db.Exists(string(args[0])) {
		c.Simple("tensor")
	} else {
		c.Simple("none")
	}
	return nil
}

// list returns the keys that match a pattern and that the token may use.
func (c *conn) list(pattern []byte) ([]string, error) {
	prefix, ok := strings.CutSuffix(string(pattern), "*")
	if !ok || strings.ContainsAny(prefix, "*?[\\") {
		return nil, refuse("ERR", "a pattern is a prefix and one *, not %.80q", pattern)
	}
	keys := c.db.Keys(prefix)
	return slices.DeleteFunc(keys, func(key string) bool { return !strings.HasPrefix(key, c.token.Prefix) }), nil
}

func (c *conn) keys(args [][]byte) error {
	keys, err := c.list(args[0])
	if err != nil {
		return err
	}
	c.texts(keys)
	return nil
}

func (c *conn) texts(list []string) {
	c.Array(len(list))
	for _, s := range list {
		c.Text(s)
	}
}

// scan goes through the keys in the order of their hashes: a cursor says where,
// whatever comes and goes meanwhile.
func (c *conn) scan(args [][]byte) error {
	cursor, err := strconv.ParseUint(string(args[0]), 10, 64)
	if err != nil {
		return refuse("ERR", "invalid cursor")
	}
	pattern, count := []byte("*"), 10
	for rest := args[1:]; len(rest) > 0; rest = rest[2:] {
		if len(rest) == 1 {
			return c.usage()
		}
		switch strings.ToUpper(string(rest[0])) {
		case "MATCH":
			pattern = rest[1]
		case "COUNT":
			if count, err = number("count", rest[1], 1, maxArgs); err != nil {
				return err
			}
		default:
			return c.usage()
		}
	}
	keys, err := c.list(pattern)
	if err != nil {
		return err
	}
	slices.SortFunc(keys, func(a, b string) int { return cmp.Compare(place(a), place(b)) })
	first, _ := slices.BinarySearchFunc(keys, cursor, func(key string, at uint64) int { return cmp.Compare(place(key), at) })
	end := min(first+count, len(keys))
	for end < len(keys) && end > first && place(keys[end]) == place(keys[end-1]) {
		end++
	}
	next := "0"
	if end < len(keys) {
		next = strconv.FormatUint(place(keys[end]), 10)
	}
	c.Array(2)
	c.Text(next)
	c.texts(keys[first:end])
	return nil
}

// place is where a key comes in a scan, 1 or more, and no more than all
// clients can read as a number.
func place(key string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(key))
	return h.Sum64()>>16 | 1
}

func (c *conn) size([][]byte) error {
	keys, err := c.list([]byte("*"))
	if err != nil {
		return err
	}
	c.Int(int64(len(keys)))
	return nil
}

func (c *conn) del(args [][]byte) error {
	keys := make([]string, len(args))
	for i, key := range args {
		keys[i] = string(key)
	}
	c.Int(int64(c.db.Delete(keys...)))
	return nil
}

func (c *conn) rename(args [][]byte) error {
	if err := c.db.Rename(string(args[1]), string(args[0])); err != nil {
		return err
	}
	return c.ok()
}

// unit is that of EXPIRE and TTL, or of PEXPIRE and PTTL.
func (c *conn) unit() time.Duration {
	if strings.HasPrefix(c.current().Name, "P") {
		return time.Millisecond
	}
	return time.Second
}

// maxExpiry is about a century: more would not fit a Duration.
const maxExpiry = 100 * 365 * 24 * time.Hour

func (c *conn) expire(args [][]byte) error {
	unit := c.unit()
	n, err := strconv.ParseInt(string(args[1]), 10, 64)
	if err != nil || n > int64(maxExpiry/unit) {
		return refuse("ERR", "value is not an integer or out of range")
	}
	found := c.db.Expire(string(args[0]), time.Now().Add(max(time.Duration(n), 0)*unit))
	c.yes(found)
	return nil
}

func (c *conn) yes(yes bool) {
	n := int64(0)
	if yes {
		n = 1
	}
	c.Int(n)
}

func (c *conn) ttl(args [][]byte) error {
	at, ok := c.db.Expiry(string(args[0]))
	switch unit := c.unit(); {
	case !ok:
		c.Int(-2)
	case at.IsZero():
		c.Int(-1)
	default:
		c.Int(int64((time.Until(at) + unit/2) / unit))
	}
	return nil
}

func (c *conn) persist(args [][]byte) error {
	at, ok := c.db.Expiry(string(args[0]))
	c.yes(ok && !at.IsZero() && c.db.Expire(string(args[0]), time.Time{}))
	return nil
}
