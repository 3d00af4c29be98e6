// Package sshd runs SSH servers of tests, on loopback and for root.
package sshd

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
)

// A Server accepts connections and has an sshd for each, which serves files and nothing else.
type Server struct {
	l    *net.TCPListener
	keys string

	mu       sync.Mutex
	closed   bool
	sessions map[*exec.Cmd]struct{}
	wg       sync.WaitGroup
}

// Start starts a server with keys of its own, in a new directory below dir.
func Start(dir string) (*Server, error) {
	keys, err := os.MkdirTemp(dir, "sshd-")
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"host", "user"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(keys, name)).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("ssh-keygen: %w\n%s", err, out)
		}
	}
	config := fmt.Sprintf("HostKey %[1]s/host\nAuthorizedKeysFile %[1]s/user.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nSubsystem sftp internal-sftp\nForceCommand internal-sftp\n", keys)
	if err := os.WriteFile(filepath.Join(keys, "config"), []byte(config), 0o600); err != nil {
		return nil, err
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // where sshd, as root, becomes nobody
		return nil, err
	}
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	s := &Server{l: l, keys: keys, sessions: map[*exec.Cmd]struct{}{}}
	s.wg.Go(s.accept)
	return s, nil
}

// Options are those of sshfs, and what it is to mount: dir.
func (s *Server) Options(dir string) []string {
	return []string{
		"-p", fmt.Sprint(s.l.Addr().(*net.TCPAddr).Port), "-o", "IdentityFile=" + filepath.Join(s.keys, "user"),
		"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "root@127.0.0.1:" + dir,
	}
}

func (s *Server) accept() {
	for {
		conn, err := s.l.AcceptTCP()
		if err != nil {
			return
		}
		f, err := conn.File()
		_ = conn.Close()
		if err != nil {
			return
		}
		cmd := exec.Command("/usr/sbin/sshd", "-i", "-f", filepath.Join(s.keys, "config"))
		cmd.Stdin, cmd.Stdout = f, f
		s.mu.Lock()
		if !s.closed && cmd.Start() == nil {
			s.sessions[cmd] = struct{}{}
			s.wg.Go(func() {
				_ = cmd.Wait() // it says how the client has gone
				s.mu.Lock()
				defer s.mu.Unlock()
				delete(s.sessions, cmd)
			})
		}
		s.mu.Unlock()
		_ = f.Close()
	}
}

// Close ends the server and all sessions, and waits for their ends.
func (s *Server) Close() {
	_ = s.l.Close()
	s.mu.Lock()
	s.closed = true
	for cmd := range s.sessions {
		_ = cmd.Process.Kill()
	}
	s.mu.Unlock()
	s.wg.Wait()
}
