package function

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Users of instances are numbers that nobody else has by systemd's division (60578 to 61183 are unused) and that
// containers map. userLocks has a locked byte for each that is taken.
const (
	firstUser = 60578
	users     = 606
	userLocks = "/run/spirt.users"
)

// Limits of an instance's process.
const (
	maxFiles     = 1024
	maxProcesses = 512 // and threads, where the user is its own
)

// system is what every program may read: it has no secrets of a user.
var system = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/nix/store", "/proc", "/sys"}

// devices may be written to as well.
var devices = []string{"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"}

// isolator keeps instances from what is not theirs. Two things do it, both where there are both:
//
// A user of its own for each instance, where this process may change users, with one group for the platform. It has no
// other groups and no way to others' files, processes or sockets.
//
// Landlock: what the kernel denies to a thread it denies to what this thread starts, for good. Each instance is started
// by a thread that restricts itself first, so that no instance is in the domain of another, and none can trace, signal or
// read the memory of a process outside its own.
type isolator struct {
	policy Isolation
	abi    int // of Landlock; 0: none
	scope  uint64
	exe    string
	locks  *os.File // of users; nil where they cannot be locked, and two platforms may take the same
	mu     sync.Mutex
	taken  map[int]bool // users that this platform has taken, by number from 0
	group  int          // number of the group, and of the user of instances that get no other; 0: instances have this user
}

// newIsolator returns errNotIsolated where the system can do nothing.
func newIsolator(c Config) (*isolator, error) {
	exe, err := exec.LookPath(c.Command[0])
	if err != nil {
		return nil, err
	}
	if given, err := os.Stat(exe); err == nil {
		if self, err := os.Stat(Self()); err == nil && os.SameFile(given, self) {
			exe = Self() // which needs no way through folders that are closed to the user of an instance
		}
	}
	s := &isolator{policy: c.Isolation, exe: exe, abi: landlockABI(), taken: map[int]bool{}}
	if c.Dir != "" {
		s.policy.Read = append(append([]string(nil), s.policy.Read...), c.Dir)
	}
	if s.abi >= 6 {
		s.scope = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
		// Before this correction threads of one process could not signal each other across domains: Go's do.
		if errata, _, _ := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_ERRATA); errata != ^uintptr(0) && errata&2 != 0 {
			s.scope |= unix.LANDLOCK_SCOPE_SIGNAL
		}
	}
	// No core file of this process's memory, where keys are, and no look into it for others of the same user.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("closing this process's memory to others: %w", err)
	}
	if mayChangeUser() {
		s.locks, _ = os.OpenFile(userLocks, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if s.group = s.takeUser(); s.group == 0 {
			s.close()
			return nil, fmt.Errorf("all %d users for instances are taken: see who has %s open", users, userLocks)
		}
		for _, socket := range s.policy.Sockets {
			if err := shareSocket(socket, s.group); err != nil {
				s.close()
				return nil, err
			}
		}
	} else if s.abi == 0 {
		return s, errNotIsolated
	}
	return s, nil
}

func landlockABI() int {
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0
	}
	return int(v)
}

// mayChangeUser reports whether this process may start others as the users for instances.
func mayChangeUser() bool {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return false
	}
	const need = 1<<unix.CAP_SETUID | 1<<unix.CAP_SETGID | 1<<unix.CAP_CHOWN
	_, after, _ := strings.Cut(string(status), "\nCapEff:\t")
	hex, _, _ := strings.Cut(after, "\n")
	if caps, err := strconv.ParseUint(hex, 16, 64); err != nil || caps&need != need {
		return false
	}
	if b, err := os.ReadFile("/proc/self/setgroups"); err != nil || strings.TrimSpace(string(b)) != "allow" {
		return false
	}
	return mapped("/proc/self/uid_map") && mapped("/proc/self/gid_map")
}

// mapped reports whether the numbers of users for instances exist in this process's user namespace.
func mapped(file string) bool {
	f, err := os.Open(file)
	if err != nil {
		return false
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var inside, outside, count uint64
		if _, err := fmt.Sscan(lines.Text(), &inside, &outside, &count); err == nil && inside <= firstUser && inside+count >= firstUser+users {
			return true
		}
	}
	return false
}

// takeUser returns the number of a user that no other instance on this machine has, 0 if all are taken.
func (s *isolator) takeUser() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	start := rand.IntN(users) // the user of an instance that ended a moment ago is not likely to be next
	for i := range users {
		n := (start + i) % users
		if !s.taken[n] && s.lockUser(n, unix.F_WRLCK) == nil {
			s.taken[n] = true
			return firstUser + n
		}
	}
	return 0
}

func (s *isolator) lockUser(n int, kind int16) error {
	if s.locks == nil {
		return nil
	}
	return unix.FcntlFlock(s.locks.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: int64(n), Len: 1})
}

func (s *isolator) leaveUser(user int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lockUser(user-firstUser, unix.F_UNLCK)
	delete(s.taken, user-firstUser)
}

// shareSocket lets the group in at a socket and at the folder it is in.
func shareSocket(path string, group int) error {
	for name, mode := range map[string]fs.FileMode{path: 0o660, filepath.Dir(path): 0o710} {
		if err := errors.Join(os.Chown(name, -1, group), os.Chmod(name, mode)); err != nil {
			return fmt.Errorf("letting functions reach %s: %w", path, err)
		}
	}
	return nil
}

// String says what keeps instances apart.
func (s *isolator) String() string {
	var parts []string
	if s.group != 0 {
		parts = append(parts, "users of their own")
	}
	if s.abi > 0 {
		parts = append(parts, fmt.Sprintf("Landlock %d", s.abi))
	}
	if parts == nil {
		return "none"
	}
	return strings.Join(parts, ", ")
}

func (s *isolator) close() {
	if s.locks != nil {
		s.locks.Close() // and with it all locks
	}
}

// cell is what one instance has of its own.
type cell struct {
	s     *isolator
	user  int    // 0: this process's
	temp  string // empty: none
	rules []rule
	port  uint16 // of its Runtime API
}

// rule allows access to a file or what is below a folder.
type rule struct {
	path   string
	access uint64
}

// Rights of Landlock; those of files are all that a rule about a file may have.
const (
	readRights  = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	fileRights  = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	writeRights = 1<<13 - 1 | unix.LANDLOCK_ACCESS_FS_REFER | unix.LANDLOCK_ACCESS_FS_TRUNCATE // all but device control
)

// fsRights are those that a version of Landlock knows.
func fsRights(abi int) uint64 {
	rights := uint64(1<<13 - 1)
	for since, right := range map[int]uint64{2: unix.LANDLOCK_ACCESS_FS_REFER, 3: unix.LANDLOCK_ACCESS_FS_TRUNCATE, 5: unix.LANDLOCK_ACCESS_FS_IOCTL_DEV} {
		if abi >= since {
			rights |= right
		}
	}
	return rights
}

// prepare makes a cell for cmd, whose output is out and whose Runtime API is at address. It sets cmd's user and
// environment; close the cell when the process has ended, or did not start.
func (s *isolator) prepare(cmd *exec.Cmd, out *output, address string) (_ *cell, err error) {
	if s == nil {
		return nil, nil
	}
	cmd.Path = s.exe
	c := &cell{s: s}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if at, err := net.ResolveTCPAddr("tcp", address); err == nil {
		c.port = uint16(at.Port)
	}
	if s.group != 0 {
		if c.user = s.takeUser(); c.user == 0 {
			return nil, fmt.Errorf("all %d users for instances are taken", users)
		}
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(c.user), Gid: uint32(s.group)}
		if err := out.w.Chown(c.user, s.group); err != nil { // so that it can open /dev/stdout
			return nil, fmt.Errorf("giving an instance its output: %w", err)
		}
	}
	if s.policy.Temp {
		if c.temp, err = os.MkdirTemp("", "spirt-function-"); err != nil {
			return nil, err
		}
		if c.user != 0 {
			if err := os.Chown(c.temp, c.user, s.group); err != nil {
				return nil, err
			}
		}
		cmd.Env = append(cmd.Env, "TMPDIR="+c.temp)
		c.rules = append(c.rules, rule{c.temp, writeRights})
	}
	c.rules = append(c.rules, rule{s.exe, readRights})
	for _, path := range system {
		c.rules = append(c.rules, rule{path, readRights})
	}
	for _, path := range devices {
		c.rules = append(c.rules, rule{path, readRights | fileRights})
	}
	for _, path := range s.policy.Read {
		c.rules = append(c.rules, rule{path, readRights})
	}
	for _, path := range s.policy.Write {
		c.rules = append(c.rules, rule{path, writeRights})
	}
	return c, nil
}

// start starts cmd inside the cell. It may restrict the calling thread for good, which must be locked to its goroutine
// and end with it, but not before the process: then the kernel would kill it.
func (c *cell) start(cmd *exec.Cmd) error {
	if c == nil {
		return cmd.Start()
	}
	// What this process was given by its own parent may be open without close-on-exec.
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil && err != unix.ENOSYS && err != unix.EINVAL {
		return fmt.Errorf("closing files to an instance: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil { // of this thread
		return fmt.Errorf("taking privileges from an instance: %w", err)
	}
	if c.s.abi > 0 {
		if err := c.restrict(); err != nil {
			return fmt.Errorf("isolating an instance by Landlock: %w", err)
		}
	}
	if c.user != 0 {
		// Without CAP_SYS_RESOURCE, as in most containers, only a user sets its own limits: this thread is that user, in
		// one of three ways to be one and for as long as it takes. Other threads are not changed.
		c.realUser(c.user, c.s.group)
		defer c.realUser(os.Getuid(), os.Getgid())
	}
	if err := cmd.Start(); err != nil {
		if c.user != 0 && errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w: instances have a user of their own, who must be let in to the executable and its folders (chmod o+rx), and to the working folder", err)
		}
		return err
	}
	limits := map[int]uint64{unix.RLIMIT_CORE: 0, unix.RLIMIT_NOFILE: maxFiles}
	if c.user != 0 {
		limits[unix.RLIMIT_NPROC] = maxProcesses
	}
	for resource, limit := range limits {
		var old unix.Rlimit
		err := unix.Prlimit(cmd.Process.Pid, resource, nil, &old)
		if err == nil {
			limit = min(limit, old.Max)
			err = unix.Prlimit(cmd.Process.Pid, resource, &unix.Rlimit{Cur: limit, Max: limit}, nil)
		}
		if err != nil && err != unix.ESRCH { // it has ended already
			cmd.Process.Kill()
			cmd.Wait()
			return fmt.Errorf("limiting an instance: %w", err)
		}
	}
	return nil
}

func isMainThread() bool { return unix.Gettid() == os.Getpid() }

// realUser sets the real user and group of this thread.
func (c *cell) realUser(user, group int) {
	const keep = ^uintptr(0)
	unix.RawSyscall(unix.SYS_SETRESGID, uintptr(group), keep, keep)
	unix.RawSyscall(unix.SYS_SETRESUID, uintptr(user), keep, keep)
}

// restrict puts this thread, and what it starts, into a Landlock domain.
func (c *cell) restrict() error {
	abi, rights := c.s.abi, fsRights(c.s.abi)
	attr := unix.LandlockRulesetAttr{Handled_access_fs: rights, Scoped: c.s.scope}
	if abi >= 4 && !c.s.policy.Network {
		attr.Handled_access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
	}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return fmt.Errorf("making a set of rules: %w", errno)
	}
	defer unix.Close(int(fd))
	for _, r := range c.rules {
		if err := allow(int(fd), r.path, r.access&rights); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("allowing %s: %w", r.path, err)
		}
	}
	if attr.Handled_access_net != 0 {
		port := struct{ access, port uint64 }{unix.LANDLOCK_ACCESS_NET_CONNECT_TCP, uint64(c.port)}
		const rulePort = 2 // LANDLOCK_RULE_NET_PORT
		if _, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, fd, rulePort, uintptr(unsafe.Pointer(&port)), 0, 0, 0); errno != 0 {
			return fmt.Errorf("allowing the Runtime API: %w", errno)
		}
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); errno != 0 {
		return fmt.Errorf("restricting: %w", errno)
	}
	return nil
}

func allow(ruleset int, path string, access uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return err
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		access &= fileRights
	}
	// The kernel takes the structure without the padding at its end.
	attr := unix.LandlockPathBeneathAttr{Allowed_access: access, Parent_fd: int32(fd)}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&attr)), 0, 0, 0)
	runtime.KeepAlive(&attr)
	if errno != 0 {
		return errno
	}
	return nil
}

// close removes what the instance leaves. Not to be called from a restricted thread.
func (c *cell) close() {
	if c == nil {
		return
	}
	if c.temp != "" {
		os.RemoveAll(c.temp)
	}
	if c.user != 0 {
		c.s.leaveUser(c.user)
	}
}

// Isolates says what keeps instances of this process apart from what is not theirs; empty: nothing.
func Isolates() string {
	abi := landlockABI()
	switch {
	case mayChangeUser() && abi > 0:
		return fmt.Sprintf("users of their own and Landlock, ABI %d", abi)
	case mayChangeUser():
		return "users of their own"
	case abi > 0:
		return fmt.Sprintf("Landlock, ABI %d", abi)
	}
	return ""
}
