// Package webtree is a web server's files as a file system of io/fs.
//
// URL/index.txt lists them, one relative URL a line (dir/name, %-escaped where need be); empty lines and those that start
// with # are skipped. Sizes and times are those of HEAD when the tree is made. The server has to serve ranges; a file that
// has changed since cannot be read any more, for its parts might not fit together.
package webtree

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"strings"

	"github.com/sluicefs/sluice/fsbackend/iofs"
)

// New asks the server at base for its files. client should have a Timeout.
func New(client *http.Client, base string) (fs.FS, error) {
	if u, err := url.Parse(base); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("list the files: %q: expected a URL that starts with http:// or https://", base)
	}
	base = strings.TrimSuffix(base, "/")
	resp, err := client.Get(base + "/index.txt")
	if err != nil {
		return nil, fmt.Errorf("list the files: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("list the files: %s/index.txt: %s; expected a list of relative URLs, one a line", base, resp.Status)
	}
	files := make(map[string]iofs.File)
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		path, err := url.PathUnescape(line)
		if err != nil {
			return nil, fmt.Errorf("list the files: %w", err)
		}
		if files[path], err = head(client, base+"/"+line); err != nil {
			return nil, err
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("list the files: %w", err)
	}
	return iofs.Tree(files)
}

// head finds out what there is to know of a file before it is read.
func head(client *http.Client, url string) (iofs.File, error) {
	resp, err := client.Head(url)
	if err != nil {
		return iofs.File{}, err
	}
	_ = resp.Body.Close()
	switch {
	case resp.StatusCode != http.StatusOK:
		return iofs.File{}, fmt.Errorf("%s: %s", url, resp.Status)
	case resp.ContentLength < 0:
		return iofs.File{}, fmt.Errorf("%s: the server does not say its size (Content-Length)", url)
	case resp.Header.Get("Accept-Ranges") != "bytes":
		return iofs.File{}, fmt.Errorf("%s: the server does not serve ranges (Accept-Ranges: bytes), without which no part of a file can be read", url)
	}
	f := &file{client: client, url: url, size: resp.ContentLength, modified: resp.Header.Get("Last-Modified")}
	out := iofs.File{Size: f.size, Data: f}
	if t, err := http.ParseTime(f.modified); err == nil {
		out.ModTime = t
	}
	return out, nil
}

// file is a file on the server.
type file struct {
	client   *http.Client
	url      string
	size     int64
	modified string // Last-Modified, "" if the server does not say
}

// ReadAt implements io.ReaderAt with one request.
func (f *file) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("read at a negative offset")
	}
	n := min(int64(len(p)), f.size-off)
	if n <= 0 {
		return 0, io.EOF
	}
	req, err := http.NewRequest(http.MethodGet, f.url, nil)
	if err != nil {
		return 0, err
	}
	span := fmt.Sprintf("%d-%d", off, off+n-1)
	req.Header.Set("Range", "bytes="+span)
	if f.modified != "" {
		req.Header.Set("If-Unmodified-Since", f.modified)
	}
	resp, err := f.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	expected := fmt.Sprintf("bytes %s/%d", span, f.size)
	if got := resp.Header.Get("Content-Range"); resp.StatusCode != http.StatusPartialContent || got != expected {
		return 0, fmt.Errorf("%s: answered %s with Content-Range %q, expected 206 with %q", f.url, resp.Status, got, expected)
	}
	got, err := io.ReadFull(resp.Body, p[:n])
	if err == nil && n < int64(len(p)) {
		err = io.EOF
	}
	return got, err
}
